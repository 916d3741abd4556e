"""A toy puzzle data set: rows of six tokens whose answer is the row turned round, each group with an identifier of its own."""

from pathlib import Path

import numpy as np

from dataset.puzzles.storage import BLANK_IDENTIFIER, create_split, new_dataset, write_identifiers

TOKENS, VOCAB = 6, 7


def write_puzzles(folder: Path, *, train: int = 12, test: int = 5, forms: int = 2, tokens: int = TOKENS, seed: int = 0) -> str:
    """`train` and `test` groups of `forms` puzzles with 1 or 2 examples each; label 0 isn't supervised. Returns `folder`."""
    rng = np.random.default_rng(seed)
    with new_dataset(folder) as partial:
        for split, groups in (("train", train), ("test", test)):
            examples = rng.integers(1, 3, groups * forms)
            rows = create_split(
                partial / split,
                seq_len=tokens,
                vocab_size=VOCAB,
                num_puzzle_identifiers=train + 1,
                puzzles_per_group=np.full(groups, forms),
                examples_per_puzzle=examples,
                puzzle_identifiers=np.repeat(np.arange(groups) % train + 1, forms),
                total_puzzles=groups * forms,
            )
            inputs = rng.integers(1, VOCAB, (int(examples.sum()), tokens)).astype(np.uint8)
            labels = inputs[:, ::-1].copy()
            labels[:, 0] = 0
            rows.write(0, inputs, labels)
        write_identifiers(partial, [BLANK_IDENTIFIER, *(f"p{i}" for i in range(1, train + 1))])
    return str(folder)


# Presets of cfg_pretrain; the others are of cfg_pretrain_instruct.
PUZZLE_PRESETS = ("arc1", "arc2", "arc_small", "maze", "maze_small", "sudoku_attention", "sudoku_mlp", "sudoku_small")

# A network and a run on it that take a second; float64, so that what is equal is seen to be.
TINY_PUZZLES = (
    "evaluators=[]",
    "device=cpu",
    "wandb=disabled",
    "plot=false",
    "report=false",
    "arch.hidden_size=16",
    "arch.num_heads=2",
    "arch.expansion=1",
    "arch.H_cycles=2",
    "arch.L_cycles=2",
    "arch.L_layers=1",
    "arch.halt_max_steps=3",
    "arch.puzzle_emb_ndim=16",
    "arch.puzzle_emb_len=2",
    "arch.forward_dtype=float64",
    "global_batch_size=4",
    "epochs=4",
    "eval_interval=2",
    "lr=1e-2",
    "lr_warmup_steps=3",
    "lr_min_ratio=0.1",
)
