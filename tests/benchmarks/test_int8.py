"""What benchmarks/int8.py refuses."""

import pytest

from benchmarks import int8
from norton_deploy.errors import UserError


def test_a_form_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--forms: no int3; there are fp32, ONNX Runtime, "):
        int8.main(int8.Settings(forms=("int3",)))
