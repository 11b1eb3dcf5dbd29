"""GLM (arXiv:2103.10360). `import glmd.glm` makes the auto classes of transformers know the folders of GLMs."""

from glmd.models.glm import GlmdGlmConfig, GlmdGlmForBlankInfilling, GlmdGlmModel

__all__ = ["GlmdGlmConfig", "GlmdGlmForBlankInfilling", "GlmdGlmModel"]
