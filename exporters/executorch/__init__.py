"""ExecuTorch programs (.pte) for phones and boards: XNNPACK where it can, portable kernels elsewhere."""

from optc.exporters.executorch.export import export_executorch
from optc.exporters.executorch.legal import LEGAL, require_executorch

__all__ = ["LEGAL", "export_executorch", "require_executorch"]
