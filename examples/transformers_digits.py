"""A tiny Llama under the Hugging Face Trainer; it learns the next pixel of digits, and nothing is downloaded.

pip install 'noetherperf[run,integrations]'
python examples/transformers_digits.py --out runs/transformers
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import noetherperf as nperf
from noetherperf.integrations.transformers import ChargeCallback

N_LAYERS = 2
GREYS = 17  # a pixel is one of 0 to 16


def symmetries() -> list[nperf.Symmetry]:
    """Values into the attention's output and, in a gated layer, the ungated half into its output: both linear."""
    found: list[nperf.Symmetry] = [nperf.Translation("softmax", [nperf.Part("lm_head.weight", axis=1)])]
    for i in range(N_LAYERS):
        for name, inward, outward in (
            ("values", "self_attn.v_proj", "self_attn.o_proj"),
            ("mlp", "mlp.up_proj", "mlp.down_proj"),
        ):
            found.append(
                nperf.Rescale(
                    f"layer{i}.{name}",
                    inward=[nperf.Part(f"model.layers.{i}.{inward}.weight", axis=0)],
                    outward=[nperf.Part(f"model.layers.{i}.{outward}.weight", axis=1)],
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    set_seed(0)
    pixels = torch.as_tensor(load_digits().data, dtype=torch.int64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=GREYS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,  # as many as heads, so that each value channel has one column of o_proj
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, symmetries=symmetries())
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in pixels],
        optimizers=(optimizer, None),
    )
    trainer.add_callback(ChargeCallback(trainer, every=10, record=args.out / "record.zarr", exists="overwrite"))
    trainer.train()
    print(nperf.open_record(args.out / "record.zarr")["layer0.mlp"])


if __name__ == "__main__":
    main()
