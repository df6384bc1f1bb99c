"""Stage 0 is proved too: a captured program is held to the forward of the model that it was captured from."""

from optc.compiler.capture.proof.models import SHORTEST, prove_model
from optc.compiler.capture.proof.modules import prove_module

__all__ = ["SHORTEST", "prove_model", "prove_module"]
