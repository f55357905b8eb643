"""The fault tests again, with servers that decode in CUDA graphs on a GPU."""

import pytest
from test_faults import *  # noqa: F403

pytestmark = pytest.mark.gpu
