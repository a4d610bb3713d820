"""Serves what train_deepseek_v3.py trained: continuous batching on a paged latent cache.

    python examples/serve_deepseek_v3.py --prompt "import " --prompt "def parse("

More requests than the batch has rows, of different lengths: they join as rows and pages become
free, and leave when they are done. Prompts are fed in chunks by one compiled step, tokens by
another.
"""

import launch  # isort: skip; sets up the environment before jax is imported

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence

import jax
from absl import app, flags

from jax_ds import models

_PROMPTS = (
    "import ",
    "class ",
    "    def __init__(self",
    "for key in ",
    "    if not isinstance(",
    "def main():\n",
    "    raise ValueError(",
    "# ",
    "try:\n    ",
    "    return ",
    "from collections import ",
    "    for line in ",
    "with open(",
    '    """Return ',
    "    while ",
    "    self._",
    "def test_",
    "@property\n    def ",
    "    else:\n        ",
    "if __name__ == ",
)


def serve(
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str] = _PROMPTS,
    *,
    new_bytes: int = 96,
    temperature: float = 0.7,
    shown: int = 6,
) -> list[str]:
    """Loads the weights in `folder`, completes the prompts, prints the first ones and the speed."""
    config = load_config(folder, mesh)
    shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    specs = models.param_specs(config, shapes)
    params = models.load_tree(folder / "weights.npz", shapes, mesh, specs)
    encoded = [tuple(prompt.encode()) for prompt in prompts]
    engine = models.Engine(
        config,
        params,
        mesh,
        slots=-(-16 // mesh.size),
        pages=8,
        max_len=max(map(len, encoded)) + 2 * new_bytes,
        chunk=16,
        temperature=temperature,
    )
    # Both steps compile before anything is timed.
    engine.submit(models.Request(encoded[0], 2))
    while engine.busy:
        engine.step()
    # Ragged in both ways: prompts of different lengths, continuations of different lengths.
    completions = [
        engine.submit(models.Request(prompt, new_bytes // 2 + 13 * i % new_bytes))
        for i, prompt in enumerate(encoded)
    ]
    start, new, steps = time.perf_counter(), 0, 0
    while engine.busy:
        new += engine.step()
        steps += 1
    seconds = time.perf_counter() - start
    texts = [bytes((*c.request.prompt, *c.tokens)).decode(errors="replace") for c in completions]
    if jax.process_index() == 0:
        for written in texts[:shown]:
            print(f"{'-' * 30}\n{written}")
        print(
            f"{'-' * 30}\n{len(prompts)} requests, {new} bytes in {steps} steps, {seconds:.1f} s: "
            f"{new / seconds:,.0f} tokens per second."
        )
    return texts


def load_config(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> models.ModelConfig:
    """The model's configuration, for the mesh at hand instead of the one that trained it."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"--model: must be a folder that training wrote, got {folder}")
    stored = json.loads(file.read_text())
    names = mesh.axis_names
    stored["axis_name"] = names[0] if len(names) == 1 else names
    return dataclasses.replace(models.ModelConfig(), **stored)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; prompts go to --prompt")
    mesh, _ = launch.start()
    prompts = flags.FLAGS.prompt or _PROMPTS
    serve(
        pathlib.Path(flags.FLAGS.model),
        mesh,
        prompts,
        new_bytes=flags.FLAGS.new_bytes,
        temperature=flags.FLAGS.temperature,
        shown=len(prompts),
    )


if __name__ == "__main__":
    flags.DEFINE_string("model", "demo-out", "folder that train_deepseek_v3.py wrote")
    flags.DEFINE_multi_string("prompt", [], "texts to continue (default: a few of Python)")
    flags.DEFINE_integer("new_bytes", 96, "about how many bytes each prompt is continued by")
    flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest byte")
    launch.run(main)
