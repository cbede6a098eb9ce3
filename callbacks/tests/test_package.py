"""What importing costs, and which names a stranger may rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import scale_equalization


def test_import_does_not_import_lightning():
    code = "import scale_equalization, sys; print([m for m in sys.modules if 'lightning' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_exists():
    assert [n for n in scale_equalization.__all__ if not hasattr(scale_equalization, n)] == []
    with pytest.raises(AttributeError, match="has no attribute 'fold'"):
        _ = scale_equalization.fold
