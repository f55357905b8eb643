"""Page allocators: SGLang's, able to run without Triton, and told to report freed pages."""

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator


class PlainPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator; on a CPU, torch computes what its Triton kernels would.

    Pages are handed out in the same order.
    """

    def alloc_extend(
        self,
        prefix_lens,
        prefix_lens_cpu,
        seq_lens,
        seq_lens_cpu,
        last_loc,
        extend_num_tokens,
        num_new_pages=None,
    ):
        if torch.device(self.device).type != "cpu":
            return super().alloc_extend(
                prefix_lens,
                prefix_lens_cpu,
                seq_lens,
                seq_lens_cpu,
                last_loc,
                extend_num_tokens,
                num_new_pages,
            )
        return self._extend(prefix_lens, seq_lens, last_loc)

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        if torch.device(self.device).type != "cpu":
            return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        return self._extend(seq_lens - 1, seq_lens, last_loc)

    def _extend(self, prefix_lens, seq_lens, last_loc):
        """Locations of tokens [prefix, seq) of each request, or None when pages run out.

        A token that shares its page with the prefix follows `last_loc`; the others go to new pages.
        """
        page = self.page_size
        if self.need_sort:
            self.merge_and_sort_free()
        first_page = (prefix_lens + page - 1) // page  # pages the prefix already has
        new_pages = (seq_lens + page - 1) // page - first_page
        total = int(new_pages.sum())
        if total > len(self.free_pages):
            return None
        lens = seq_lens - prefix_lens
        request = torch.repeat_interleave(torch.arange(len(lens)), lens)
        start = torch.cumsum(lens, 0) - lens
        position = torch.arange(int(lens.sum())) - start[request] + prefix_lens[request]
        nth = position // page - first_page[request]  # -1 on the prefix's last page
        follow = last_loc[request] + 1 + position - prefix_lens[request]
        if total == 0:
            return follow.to(torch.int64)
        page_start = torch.cumsum(new_pages, 0) - new_pages
        # A clamp keeps the index legal where the value is not used.
        at = (page_start[request] + nth).clamp(0, total - 1)
        fresh = self.free_pages[at] * page + position % page
        self.free_pages = self.free_pages[total:]
        return torch.where(nth < 0, follow, fresh).to(torch.int64)


class TwoTierAllocator(PlainPagedAllocator):
    """Allocates logical pages; every page that comes back is reported to the coordinator.

    `_release_page_ids` is the one funnel of freed pages: finish, abort, retraction, radix eviction and
    duplicates dropped on insert all pass it.
    """

    def _release_page_ids(self, *page_ids: torch.Tensor):
        super()._release_page_ids(*page_ids)
        self._kvcache.coordinator.page_freed(torch.cat(page_ids))

    def clear(self):
        super().clear()
        self._kvcache.coordinator.clear()
