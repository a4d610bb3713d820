"""Trains a small DeepSeek-V3 model on text, then lets it write. `make demo` runs this.

    python examples/train_deepseek_v3.py                      # eight devices, FP8
    python examples/train_deepseek_v3.py --precision bf16 --mesh 2x4 --steps 50
    python examples/train_deepseek_v3.py --data my_book.txt --data src/ --out runs/mine
    python examples/train_deepseek_v3.py --resume             # after Ctrl-C, or after a crash

The devices are the machine's GPUs, or virtual ones on the CPU. examples/multi_process.sh runs
this program as several processes. The folder --out receives checkpoint.npz (all state),
weights.npz and config.json (for serve_deepseek_v3.py), loss.csv and loss.png.
"""

import launch  # isort: skip; sets up the environment before jax is imported

import csv
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
import text
from absl import app, flags
from jax.experimental import multihost_utils
from serve_deepseek_v3 import serve
from tqdm import tqdm

from jax_ds import models

_DATA = flags.DEFINE_multi_string(
    "data", [], "files or folders to train on (default: the standard library's sources)"
)
_OUT = flags.DEFINE_string("out", "demo-out", "folder for everything the run writes")
_STEPS = flags.DEFINE_integer("steps", 180, "training steps", lower_bound=1)
_RESUME = flags.DEFINE_bool("resume", False, "go on from the checkpoint in --out")
_SAVE_EVERY = flags.DEFINE_integer(
    "save_every", 100, "steps between checkpoints; 0 saves at the end only", lower_bound=0
)
_PRECISION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "precision", "fp8", ["fp8", "bf16"], "of the matrix products"
)
_SEED = flags.DEFINE_integer("seed", 0, "of weights and data order")
_BATCH = flags.DEFINE_integer("batch", 16, "sequences per step over all devices", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "bytes per sequence", lower_bound=2)
_HIDDEN = flags.DEFINE_integer("hidden", 256, "width of the model", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 3, "layers; the first is dense", lower_bound=2)
_HEADS = flags.DEFINE_integer("heads", 2, "attention heads", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("experts", 16, "routed experts", lower_bound=4)
_CAPACITY = flags.DEFINE_float(
    "capacity_factor",
    2.0,
    "rows a device has room for, per even share; 0 never drops a token",
    lower_bound=0.0,
)
_REMAT = flags.DEFINE_bool("remat", False, "recompute activations instead of saving them")
_RATE = flags.DEFINE_float("rate", 1.4e-3, "peak learning rate", lower_bound=0.0)
_DECODE = flags.DEFINE_bool("decode", True, "generate text after training")


@dataclasses.dataclass
class Run:
    """A training run: the state, what was measured, and where it is kept."""

    config: models.ModelConfig
    train: models.TrainConfig
    mesh: jax.sharding.Mesh
    state: models.TrainState
    folder: pathlib.Path
    losses: list[float]

    def save(self) -> None:
        """Each file is replaced as a whole, the checkpoint after the losses: whenever the program
        is killed, there is a loss for every step of the checkpoint."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            losses = "".join(f"{step},{loss}\n" for step, loss in enumerate(self.losses))
            _replace(self.folder / "loss.csv", "step,loss\n" + losses)
            config = json.dumps(dataclasses.asdict(self.config), indent=2)
            _replace(self.folder / "config.json", config + "\n")
        models.save_tree(self.folder / "checkpoint.npz", self.state)
        models.save_tree(self.folder / "weights.npz", self.state.params)

    def resume(self) -> None:
        specs = models.state_specs(self.config, self.train)
        try:
            path = self.folder / "checkpoint.npz"
            self.state = models.load_tree(path, self.state, self.mesh, specs)
        except ValueError as error:
            raise ValueError(f"--resume: must be of a model of these sizes, {error}") from None
        with (self.folder / "loss.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        # The state says where to go on; later losses are of steps that it has not made.
        step = int(self.state.step)
        self.losses = [*losses, *[float("nan")] * step][:step]


def _replace(path: pathlib.Path, content: str) -> None:
    """Writes a file that others see either as it was or as it is now."""
    new = path.with_name(path.name + ".new")
    new.write_text(content)
    os.replace(new, path)


class Interrupt:
    """The first Ctrl-C ends training after the step and saves; the second one kills."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def release(self) -> None:
        """From here on Ctrl-C ends the program: everything is saved."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process was interrupted: all must stop after the same step."""
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.array(self.requested))))


def start_run(mesh: jax.sharding.Mesh, axis_name: str | tuple[str, ...]) -> Run:
    """The run that the flags describe, at its first step or where the checkpoint left it."""
    config = models.ModelConfig(
        axis_name=axis_name,
        hidden=_HIDDEN.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
        num_experts=_EXPERTS.value,
        dense_ffn=2 * _HIDDEN.value,
        capacity_factor=_CAPACITY.value or None,
        precision=_PRECISION.value,
        remat=_REMAT.value,
        # Without the loop over layers XLA's CPU backend makes a third faster step of so few.
        unroll=jax.default_backend() == "cpu",
    )
    train = models.TrainConfig(steps=_STEPS.value, peak_rate=_RATE.value, warmup=10, bias_rate=0.01)
    state = models.init_state(config, train, mesh, _SEED.value)
    run = Run(config, train, mesh, state, pathlib.Path(_OUT.value), [])
    if _RESUME.value:
        run.resume()
    return run


def train(run: Run, data: text.Text, interrupt: Interrupt) -> tuple[np.ndarray[Any, Any], bool]:
    """Trains to the last step; returns the experts' load over the last steps, and whether
    training ran to its end."""
    step_fn = models.make_train_step(run.config, run.train, run.mesh)
    loads: list[np.ndarray[Any, Any]] = []
    bar = tqdm(
        total=run.train.steps,
        initial=len(run.losses),
        disable=jax.process_index() != 0,
        unit="step",
        dynamic_ncols=True,
    )
    with bar:
        for step in range(len(run.losses), run.train.steps):
            start = time.perf_counter()
            tokens = text.batch(
                data.train, step, size=_BATCH.value, length=_LENGTH.value, seed=_SEED.value
            )
            run.state, metrics = step_fn(run.state, launch.shard(tokens, run.mesh))
            # Fetching the loss every step also keeps only one step in flight.
            run.losses.append(float(metrics.loss))
            loads = [*loads[-19:], np.asarray(metrics.load)]
            rate = _BATCH.value * _LENGTH.value / (time.perf_counter() - start)
            bar.set_postfix(
                loss=f"{run.losses[-1]:.3f}",
                tok_s=f"{rate:,.0f}",
                dropped=int(metrics.num_dropped),
                refresh=False,
            )
            bar.update()
            if interrupt.agreed():
                return np.array(loads).sum(axis=0), False
            # The last step is saved by the caller.
            every = _SAVE_EVERY.value or run.train.steps
            if (step + 1) % every == 0 and step + 1 < run.train.steps:
                run.save()
    # Without a step, as where a finished run is resumed, there is no load to tell of.
    return np.array(loads).sum(axis=0) if loads else np.zeros((0, 0)), True


def evaluate(run: Run, data: text.Text) -> tuple[float, float]:
    """Held-out loss of the model, and of a byte-bigram model on the same bytes."""
    size = _BATCH.value
    windows = text.held_out_batches(
        data.held_out, batches=max(1, 256 // size), size=size, length=_LENGTH.value
    )
    evaluate = models.make_eval_step(run.config, run.mesh)
    losses = [float(evaluate(run.state.params, launch.shard(w, run.mesh))) for w in windows]
    return float(np.mean(losses)), text.bigram_loss(data.train, windows)


def print_load(load: np.ndarray[Any, Any]) -> None:
    """One line per layer: a bar per expert, the busiest against the mean, the entropy."""
    print("Expert load over the last steps (a bar per expert, full height is twice the mean):")
    for layer, counts in enumerate(load):
        share = counts / max(counts.sum(), 1)
        heights = np.clip(share * len(share) * 4, 0, 7).astype(int)
        bars = "".join(" ▁▂▃▄▅▆▇█"[1 + h] for h in heights)
        entropy = -np.sum(share * np.log(np.maximum(share, 1e-12))) / np.log(len(share))
        busiest = share.max() * len(share)
        print(f"  layer {layer + 1}  {bars}  busiest {busiest:.2f}x, entropy {entropy:.1%} of even")


def plot(run: Run, held_out: float, bigram: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(run.losses, label=f"training ({run.config.precision})")
    axes.axhline(bigram, color="tab:red", linestyle="--", label=f"byte bigram {bigram:.2f}")
    axes.axhline(held_out, color="tab:green", linestyle=":", label=f"held out {held_out:.2f}")
    axes.set(xlabel="step", ylabel="nats per byte", title="DeepSeek-V3, small, on jax_ds")
    axes.legend()
    figure.savefig(run.folder / "loss.png", dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; files to train on go to --data")
    mesh, axis_name = launch.start()
    main_process = jax.process_index() == 0
    data = text.load(_DATA.value)
    if _LENGTH.value >= data.held_out.size:
        raise ValueError(f"--length: must be below {data.held_out.size}, got {_LENGTH.value}")
    if _EXPERTS.value % math.lcm(mesh.size, models.ModelConfig.num_groups):
        raise ValueError(
            f"--experts: must be a multiple of the {mesh.size} devices and of the "
            f"{models.ModelConfig.num_groups} groups, got {_EXPERTS.value}"
        )
    # Before anything is compiled.
    if _BATCH.value % mesh.size:
        raise ValueError(
            f"--batch: must be a multiple of the {mesh.size} devices, got {_BATCH.value}"
        )
    if _RESUME.value and not (pathlib.Path(_OUT.value) / "checkpoint.npz").exists():
        raise ValueError(f"--resume: must have a checkpoint in --out, got {_OUT.value}")
    run = start_run(mesh, axis_name)
    if main_process:
        count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
        print(
            f"{count / 1e6:.1f} M parameters, {mesh.size} x {jax.devices()[0].device_kind}, "
            f"{jax.process_count()} process(es); {data.train.size / 1e6:.1f} MB of text, "
            f"{data.held_out.size / 1e6:.1f} MB held out. The first step compiles.",
            flush=True,
        )
    interrupt = Interrupt()
    load, finished = train(run, data, interrupt)
    run.save()
    interrupt.release()
    if not finished:
        if main_process:
            print(f"Interrupted after step {len(run.losses)}; saved. Go on with --resume.")
        sys.exit(130)
    held_out, bigram = evaluate(run, data)
    if main_process:
        if load.size:
            print_load(load)
        plot(run, held_out, bigram)
        print(
            f"Final training loss {np.mean(run.losses[-10:]):.4f}, held out {held_out:.4f}; "
            f"byte bigram {bigram:.4f} nats per byte. Files are in {run.folder}/."
        )
    if _DECODE.value:
        serve(run.folder, mesh)


if __name__ == "__main__":
    launch.run(main)
