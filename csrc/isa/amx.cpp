// AMX-BF16: products of bf16 blocks on tiles of 16 rows x 64 bytes.
//
// Logits: A = 16 keys as they lie in memory, B = the query pairs, so C is [16 keys][heads].
// Values: A = the weights, turned to [heads][32 keys] and split into two bf16 terms, so that they are not rounded (of up
// to eight heads both terms fit one tile); B = pairs of value rows, interleaved in a scratch; C = [heads][16 columns].
#include "pairs.h"
#include "variants.h"

namespace rheo {
namespace {

// Tile registers, by the intrinsics' literal numbers. 0 to 3 are C, 4 is A, 5 is B; 6 and 7 are A and B cut to
// half a step of the dim, for dims that are 16 more than a multiple of 32: what lies behind a row or a block must
// not be multiplied, even by zero.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

// GCC's tile loads do not say that they read memory: what was stored for them must be there.
inline void stores_done() { asm volatile("" ::: "memory"); }

constexpr int kTileWords = 256;  // 16 rows of 16 words

inline void transpose(__m512 (&r)[16]) {
  __m512 s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(s[i + k]), b = _mm512_castps_pd(s[i + k + 2]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // Now lane l of r[4g + c] holds column 4l + c of rows 4g to 4g+3: transpose the 4x4 of lanes.
  for (int c = 0; c < 4; ++c) {
    const __m512 ab_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44), ab_high = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
    const __m512 cd_low = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44), cd_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
    s[c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
    s[4 + c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
    s[8 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    s[12 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = s[i];
}

template <int Width>
class AmxLogits {
 public:
  explicit AmxLogits(const Run& run) : dim_(run.dim) {
    QueryPairs heads[kMaxGroup];
    for (int h = 0; h < run.group; ++h) {
      const int needed = heads[h].split(run.q + h * dim_, dim_);
      terms_ = needed > terms_ ? needed : terms_;
    }
    for (int term = 0; term < terms_; ++term)
      for (int k = 0; k < dim_ / 2; k += 16) {
        const int words = dim_ / 2 - k < 16 ? dim_ / 2 - k : 16;
        __m512 row[16] = {};
        for (int h = 0; h < run.group; ++h)
          row[h] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << words) - 1), heads[h].words(term) + k);
        transpose(row);
        for (int i = 0; i < words; ++i) _mm512_store_ps(query_[term] + (k + i) * 16, row[i]);
      }
    const TileConfig config;
    stores_done();
    _tile_loadconfig(&config);
  }

  // Tiles given back make a context switch cheaper: it need not save them.
  ~AmxLogits() { _tile_release(); }

  static constexpr int width = Width;  // heads a row of logits

  void logits(const BFloat* keys, int, float* out, Ahead& ahead) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int stride = 2 * dim_;
    const int quarter = 16 * dim_;  // elements of 16 keys
    for (int term = 0; term < terms_; ++term) {
      const uint32_t* q = query_[term];
      int j = 0;
      for (; j + 32 <= dim_; j += 32) {
        _tile_loadd(5, q + j / 2 * 16, 64);
        _tile_loadd(4, keys + j, stride);
        _tile_dpbf16ps(0, 4, 5);
        ahead.steps(6);
        _tile_loadd(4, keys + quarter + j, stride);
        _tile_dpbf16ps(1, 4, 5);
        ahead.steps(6);
        _tile_loadd(4, keys + 2 * quarter + j, stride);
        _tile_dpbf16ps(2, 4, 5);
        ahead.steps(6);
        _tile_loadd(4, keys + 3 * quarter + j, stride);
        _tile_dpbf16ps(3, 4, 5);
        ahead.steps(6);
      }
      if (j < dim_) {
        _tile_loadd(7, q + j / 2 * 16, 64);
        _tile_loadd(6, keys + j, stride);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(6, keys + quarter + j, stride);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(6, keys + 2 * quarter + j, stride);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(6, keys + 3 * quarter + j, stride);
        _tile_dpbf16ps(3, 6, 7);
        ahead.steps(12);
      }
    }
    // Of rows of fewer than 16 heads, each store's end is the next one's to write, and the last one's room to spare.
    constexpr int row = 4 * width;
    _tile_stored(0, out, row);
    _tile_stored(1, out + 16 * width, row);
    _tile_stored(2, out + 32 * width, row);
    _tile_stored(3, out + 48 * width, row);
  }

 private:
  const int dim_;
  int terms_ = 1;
  alignas(64) uint32_t query_[2][kMaxGroup * kMaxDim / 2];  // [term][word][head]
};

// Of rows of `Width` heads, 8 or 16. Keys come in two halves of 16 pairs; which two keys a pair is follows from how weights turn.
template <int Width>
class AmxValues {
  static constexpr int kTerms = Width == 16 ? 2 : 1;  // tiles that the two terms of half the weights take
  static constexpr int kHalf = kBlockTokens / 2;

 public:
  explicit AmxValues(const Run& run) : dim_(run.dim), strips_(run.dim / 16), group_(run.group) {
    __builtin_memset(weights_, 0, sizeof weights_);
  }

  void begin(float* acc) {
    out_ = acc;
    fill(sums_[0], kTileWords * strips_, 0.0f);
  }

  void values(const float* weights, const BFloat* values, int tokens, const float* rescale, Ahead& ahead) {
    rescale_sums(rescale);
    turn_weights(weights, ahead);
    for (int n = 0; n < strips_; n += 4) {
      interleave(values + n * 16, dim_ - n * 16, tokens, ahead);
      stores_done();
      float* sums = sums_[n];
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kTileWords, 64);
      _tile_loadd(2, sums + 2 * kTileWords, 64);
      _tile_loadd(3, sums + 3 * kTileWords, 64);
      for (int half = 0; half < 2; ++half)
        for (int term = 0; term < kTerms; ++term) {
          constexpr int kSteps = 8 / kTerms;
          const uint32_t* rows = pairs_[0] + half * kTileWords;
          _tile_loadd(4, weights_[half][term], 64);
          _tile_loadd(5, rows, 64);
          _tile_dpbf16ps(0, 4, 5);
          ahead.steps(kSteps);
          _tile_loadd(5, rows + 2 * kTileWords, 64);
          _tile_dpbf16ps(1, 4, 5);
          ahead.steps(kSteps);
          _tile_loadd(5, rows + 4 * kTileWords, 64);
          _tile_dpbf16ps(2, 4, 5);
          ahead.steps(kSteps);
          _tile_loadd(5, rows + 6 * kTileWords, 64);
          _tile_dpbf16ps(3, 4, 5);
          ahead.steps(kSteps);
        }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + kTileWords, 64);
      _tile_stored(2, sums + 2 * kTileWords, 64);
      _tile_stored(3, sums + 3 * kTileWords, 64);
    }
  }

  // Adds what the second terms made and undoes the column order that `interleave` left: of two strips, words 0-3 of each
  // 8 are in the first and words 4-7 in the second. A single last strip kept its order.
  void finish() const {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int h = 0; h < group_; ++h) {
      float* out = out_ + h * dim_;
      int n = 0;
      for (; n + 2 <= strips_; n += 2) {
        const __m512 a = sum(n, h), b = sum(n + 1, h);
        _mm512_storeu_ps(out + n * 16, _mm512_permutex2var_ps(a, front, b));
        _mm512_storeu_ps(out + n * 16 + 16, _mm512_permutex2var_ps(a, back, b));
      }
      if (n < strips_) _mm512_storeu_ps(out + n * 16, sum(n, h));
    }
  }

 private:
  __m512 sum(int strip, int head) const {
    const __m512 first = _mm512_load_ps(sums_[strip] + head * 16);
    if constexpr (kTerms == 2) return first;
    else return _mm512_add_ps(first, _mm512_load_ps(sums_[strip] + (Width + head) * 16));
  }

  // Maxima rise in a sequence's first blocks, then rarely.
  void rescale_sums(const float* rescale) {
    for (int h = 0; h < group_; ++h) {
      if (rescale[h] == 1.0f) continue;
      const __m512 by = _mm512_set1_ps(rescale[h]);
      for (int n = 0; n < strips_; ++n)
        for (int row = h; row < 16; row += kTerms == 2 ? 16 : Width) {
          float* at = sums_[n] + row * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
        }
    }
  }

  // The two keys of pair p of 32.
  static constexpr int first_key(int p) { return Width == 16 ? p / 16 * 32 + p % 16 : 2 * p; }
  static constexpr int second_key(int p) { return first_key(p) + (Width == 16 ? 16 : 1); }

  // Weights [64][Width heads] to tiles of rows of 16 pairs of bf16: heads, and their second terms.
  void turn_weights(const float* weights, Ahead& ahead) {
    if constexpr (Width == 16) {
      for (int half = 0; half < 2; ++half) {
        __m512 x[16], y[16];
        turned(weights + half * kHalf * 16, x);
        ahead.steps(16);
        turned(weights + half * kHalf * 16 + 256, y);
        ahead.steps(16);
        for (int h = 0; h < 16; ++h) {
          if (h >= group_) break;
          split(x[h], y[h], weights_[half][0] + h * 16, weights_[half][1] + h * 16);
        }
      }
    } else {
      for (int half = 0; half < 2; ++half) {
        __m512 x[16];
        turned(weights + half * kHalf * 8, x);
        ahead.steps(32);
        for (int h = 0; h < 8; ++h) {
          if (h >= group_) break;
          split(x[h], x[h + 8], weights_[half][0] + h * 16, weights_[half][0] + (8 + h) * 16);
        }
      }
    }
  }

  static void turned(const float* weights, __m512 (&x)[16]) {
    for (int i = 0; i < 16; ++i) x[i] = _mm512_load_ps(weights + i * 16);
    transpose(x);
  }

  // Words of two bf16, x below y, and of what rounding to them left.
  static void split(__m512 x, __m512 y, uint32_t* high, uint32_t* low) {
    const __m512i x_high = rounded(x), y_high = rounded(y);
    const __m512i x_low = rounded(_mm512_sub_ps(x, _mm512_castsi512_ps(x_high)));
    const __m512i y_low = rounded(_mm512_sub_ps(y, _mm512_castsi512_ps(y_high)));
    _mm512_store_si512(high, _mm512_or_si512(_mm512_srli_epi32(x_high, 16), y_high));
    _mm512_store_si512(low, _mm512_or_si512(_mm512_srli_epi32(x_low, 16), y_low));
  }

  // To bf16's precision, halves away from zero; a NaN stays one, as its payload is never all ones.
  static __m512i rounded(__m512 x) {
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }

  // Up to 64 columns of a pair's rows to words at pairs_[strip][pair][column]; rows past `tokens` count as zero,
  // whatever they hold.
  void interleave(const BFloat* values, int columns, int tokens, Ahead& ahead) {
    if (columns > 64) columns = 64;
    for (int p = 0; p < kHalf; ++p) {
      const BFloat* one = values + static_cast<int64_t>(first_key(p)) * dim_;
      const BFloat* other = values + static_cast<int64_t>(second_key(p)) * dim_;
      const __mmask32 first = first_key(p) < tokens ? 0xffffffffu : 0, second = second_key(p) < tokens ? 0xffffffffu : 0;
      int j = 0;
      for (; j + 32 <= columns; j += 32) {
        const __m512i a = _mm512_maskz_loadu_epi16(first, one + j), b = _mm512_maskz_loadu_epi16(second, other + j);
        _mm512_store_si512(pairs_[j / 16] + p * 16, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(pairs_[j / 16 + 1] + p * 16, _mm512_unpackhi_epi16(a, b));
        ahead.step();
      }
      if (j < columns) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first), one + j));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(second), other + j));
        _mm512_store_si512(pairs_[j / 16] + p * 16, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }

  // Steps go by 4 strips; what the last one has too many is computed from stale words and never read.
  static constexpr int kStrips = kMaxDim / 16 + 3;

  const int dim_, strips_, group_;
  float* out_ = nullptr;
  alignas(64) uint32_t weights_[2][kTerms][kTileWords];  // [half][tile][row][pair]
  alignas(64) float sums_[kStrips][kTileWords];          // [strip][row][column], the run's sums of values
  alignas(64) uint32_t pairs_[4][2 * kTileWords];        // [strip][pair of rows][column]
};

// For up to four heads the vectors' multiply-add costs less than interleaving values.
struct FewValues : FmaValues<Avx512, BFloat, 2> {
  explicit FewValues(const Run& run) : FmaValues(run, 4) {}
};

template <int Width, class Values, int Early>
struct AmxMath : AmxLogits<Width>, Values {
  using Element = BFloat;
  using Vector = Avx512;
  static constexpr int kEarly = Early;  // as tried on a Sapphire Rapids (docs/LOG.md)
  explicit AmxMath(const Run& run) : AmxLogits<Width>(run), Values(run) {}
};

void attend_bf16(const Run& run) {
  if (run.group <= 4) attend_run<AmxMath<4, FewValues, 128>>(run);
  else if (run.group <= 8) attend_run<AmxMath<8, AmxValues<8>, 64>>(run);
  else attend_run<AmxMath<16, AmxValues<16>, 64>>(run);
}

}  // namespace

const Variant kAmx = {"amx", {attend_run<FmaMath<Avx512, float>>, attend_run<FmaMath<Avx512, Half>>, attend_bf16}};

}  // namespace rheo
