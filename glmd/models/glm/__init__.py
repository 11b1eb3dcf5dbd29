"""GLM (arXiv:2103.10360). Importing this makes AutoConfig, AutoModel and AutoModelForMaskedLM know it."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from glmd.models.glm.modeling_glmd_glm import GlmdGlmConfig, GlmdGlmForBlankInfilling, GlmdGlmModel

__all__ = ["GlmdGlmConfig", "GlmdGlmForBlankInfilling", "GlmdGlmModel"]

CODE = Path(__file__).parent / "modeling_glmd_glm.py"  # needs transformers and torch alone

AutoConfig.register(GlmdGlmConfig.model_type, GlmdGlmConfig, exist_ok=True)
AutoModel.register(GlmdGlmConfig, GlmdGlmModel, exist_ok=True)
AutoModelForMaskedLM.register(GlmdGlmConfig, GlmdGlmForBlankInfilling, exist_ok=True)
