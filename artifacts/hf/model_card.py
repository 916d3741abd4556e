"""The model card of an exported model: use, data, training, results."""

import yaml
from huggingface_hub import ModelCardData

from artifacts.checkpoint import Checkpoint
from artifacts.report import card_tables
from artifacts.weights import count_parameters

_CARD = """\
---
{header}
---

# {name}

A tiny recursive model (`{arch.name}`, [arXiv 2510.04871](https://arxiv.org/abs/2510.04871)) that answers messages:
{parameters:,} parameters, a stack of blocks applied {calls} times in each of up to {arch.halt_max_steps} ACT steps per token.
Trained with Instruct-TRM. A model of this size holds little knowledge: expect text in the form of an answer that is often wrong.

## Use

```python
from transformers import pipeline

answer = pipeline("text-generation", "FOLDER_OR_NAME_OF_THIS_MODEL", trust_remote_code=True)
messages = [{{"role": "user", "content": "What is 2 + 3?"}}]
print(answer(messages, do_sample=False)[0]["generated_text"][-1]["content"])
```

`act_steps` (1 to {arch.halt_max_steps}) is the depth; set it in the model's or generation config, or in a call. With
`halt_threshold`, a token halts once its halting probability exceeds it. The context is {config.dataset.seq_len} tokens. Text in a
message can't forge a role: a tag or `<s>` in it is plain text. Written for transformers 5.24.

## Data

{sources}. SHA-256 of the training data begins with `{data_hash}`.

{data}
## Training

{step:,} optimizer steps of {config.global_batch_size} rows, optimizer `{config.optimizer}`, peak learning rate {config.lr:g};
these are {weights}.

<details><summary>All settings</summary>

```yaml
{settings}```

</details>

## Results

{results}
## Licence

Of the weights: {licence}. The data have licences of their own.
"""


def model_card(checkpoint: Checkpoint, licence: str | None) -> str:
    """README.md with the hub's header. licence: the hub's identifier; None if it wasn't stated."""
    config = checkpoint.config
    sources = config.all_sources.values()
    repos = list(dict.fromkeys(source.repo for source in sources if source.repo is not None))
    header = ModelCardData(
        license=licence or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tiny-recursive-model", config.arch.name],
        datasets=repos or None,
    )
    links = [f"[{repo}](https://huggingface.co/datasets/{repo})" for repo in repos]
    kinds = [f"`{source.source}`" for source in sources if source.repo is None]
    data, results = card_tables(checkpoint.folder)
    return _CARD.format(
        header=header.to_yaml(),
        name=config.run_name or checkpoint.folder.parent.name,
        config=config,
        arch=config.arch,
        calls=config.arch.H_cycles * (config.arch.L_cycles + 1),
        parameters=count_parameters(checkpoint.folder),
        sources=", ".join(dict.fromkeys([*links, *kinds])),
        data_hash=checkpoint.data_hash[:16],
        data=data,
        step=checkpoint.step,
        weights="the moving average of the weights" if config.ema else "the last weights",
        settings=yaml.safe_dump(config.model_dump(), sort_keys=False),
        results=results,
        licence=licence or "not stated",
    )
