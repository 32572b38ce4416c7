"""Steps on one GPU: Tritter beside a bare loop, HF Trainer and PEFT, with tokens/s and MFU.

    python experiments/benchmarks/gpu.py --output experiments/benchmarks/gpu.csv

Every way trains the same model on the same batches with AdamW, bf16 autocast and clipped gradients,
synchronised after each step. The ways follow each other in every round, and ratios are taken within
a round. MFU is the share of the device's peak (--peak-flops; dense bf16, as published by NVIDIA)
that `training_flops` of Tritter accounts for.
"""

import os

# HF Trainer would use all that it sees
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.methods import made_up_state  # noqa: E402
from experiments.benchmarks.table import tell  # noqa: E402

LEFT_OUT, RANK = 3, 8
LAYERS = ("q_proj", "v_proj")
# Way → the way that it is compared with
WAYS = {
    "bare loop": "bare loop",
    "HF Trainer": "bare loop",
    "Tritter": "bare loop",
    "Tritter, ewc": "Tritter",
    "Tritter, replay": "Tritter",
    "Tritter, distill": "Tritter",
    "PEFT LoRA": "bare loop",
    "Tritter LoRA expert": "PEFT LoRA",
    "deep copy": "deep copy",
    "expand: llama_pro": "deep copy",
}
# Part of a device's name → FLOPs per second, dense bf16; cards in slots (PCIe, NVL) have less
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}
NOT_STEPS = ("deep copy", "expand: llama_pro")


class Clock:
    """Notes when each step ended on the device."""

    def __init__(self, device: str) -> None:
        self._device, self._times = device, list[float]()

    def note(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median time of a step, without the first steps."""
        spans = [b - a for a, b in zip(self._times, self._times[1:], strict=False)]
        return statistics.median(spans[LEFT_OUT - 1 :])


class Measurement:
    """One model with its batches."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        from tritter.core.families.presets import PRESETS

        self.options, self.device = options, "cuda" if options.accelerator == "gpu" else "cpu"
        self.config = {**PRESETS[name].config(), **options.shape}
        steps = options.steps + LEFT_OUT
        shape = (steps * options.batch_size, options.sequence_length)
        draws = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 1000, shape, generator=draws)  # int64 [steps × B, T]
        self.steps = steps

    def model(self) -> PreTrainedModel:
        from tritter.core.families import Model
        from tritter.core.models import new_model

        model: PreTrainedModel = new_model(Model(self.config), seed=0)
        return model.to(self.device).train()  # type: ignore[arg-type]

    def seconds(self, way: str) -> float:
        """Return the time of a step, or of the change of a model."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if way == "bare loop":
            return self._loop(self.model())
        if way == "HF Trainer":
            return self._hugging_face()
        if way in NOT_STEPS:
            return self._changed(way)
        if "LoRA" in way:
            return self._lora(way)
        return self._tritter(way.partition(", ")[2])

    def _loop(self, model: nn.Module, extra: Callable[[], Tensor | float] = lambda: 0.0) -> float:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, clock = torch.optim.AdamW(trained, lr=1e-4), Clock(self.device)
        for batch in self.tokens.split(self.options.batch_size):
            ids = batch.to(self.device)
            with torch.autocast(self.device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss + extra()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.note()
        return clock.seconds()

    def _hugging_face(self) -> float:
        clock = Clock(self.device)

        class Noting(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.note()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=self.options.batch_size,
                max_steps=self.steps,
                learning_rate=1e-4,
                bf16=True,
                use_cpu=self.device == "cpu",
                report_to="none",
                save_strategy="no",
                logging_steps=10,
                optim="adamw_torch",  # not fused, as the others
                weight_decay=0.01,
                disable_tqdm=True,
            )
            rows = [{"input_ids": row, "labels": row} for row in self.tokens]
            Trainer(self.model(), arguments, train_dataset=rows, callbacks=[Noting()]).train()  # type: ignore[arg-type]
        return clock.seconds()

    def _tritter(self, method: str) -> float:
        from tritter.config.launch.composition import load_config
        from tritter.data.batches import BatchStream, SequenceStream
        from tritter.methods.forgetting import EWC, Distill, Replay
        from tritter.terminal import Console
        from tritter.training import BaseModule, OptimizerSettings, Schedule, Task, fit

        name = self.options.accelerator
        words = (f"trainer={name}", "trainer.precision=bf16-mixed", "trainer.progress=off")
        settings = load_config([*words, "trainer.save_every_n_steps=0"]).trainer
        model, clock, size = self.model(), Clock(self.device), self.options.batch_size

        class Noting(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                clock.note()

        chosen = {
            "": lambda: (),
            "ewc": lambda: (EWC(ewc_lambda=1e3, at="carried", refresh_steps=None),),
            "replay": lambda: (Replay(fraction=0.25),),
            "distill": lambda: (Distill(weight=2.0),),
        }[method]()
        names = [name for name, _ in model.named_parameters()]
        task = Task(
            seed=0,
            old_sequences={"old": self.tokens},
            carried={name: torch.ones_like(model.get_parameter(name)).bool() for name in names},
            state=made_up_state(model) if method == "ewc" else {},
            teacher=copy.deepcopy(model).eval().requires_grad_(False)
            if method == "distill"
            else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            fit(
                BaseModule(
                    model,
                    schedule=Schedule(learning_rate=1e-4, max_steps=self.steps),
                    optimizer=OptimizerSettings(),
                    methods=chosen,
                ),
                BatchStream(
                    SequenceStream(self.tokens.int(), seed=0),
                    batch_size=size,
                    num_batches=self.steps,
                ),
                settings=settings,
                folder=Path(folder),
                label="benchmark",
                console=Console(quiet=True),
                task=task if chosen else None,
                observers=[Noting()],
            )
        return clock.seconds()

    def _lora(self, way: str) -> float:
        from peft import LoraConfig, get_peft_model

        from tritter.checkpoints.expert_files import AdapterShape
        from tritter.methods.experts.gates import Routing
        from tritter.methods.experts.mixture import ExpertMixture

        if way == "PEFT LoRA":
            shape = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
            return self._loop(get_peft_model(self.model(), shape))  # type: ignore[arg-type]
        mixture = ExpertMixture(self.model())
        mixture.add("code", AdapterShape(RANK, 2.0 * RANK, LAYERS), seed=0)
        mixture.routing = Routing()
        return self._loop(mixture.model.to(self.device).train())

    def _changed(self, way: str) -> float:
        import tritter

        model, clock = self.model().eval(), Clock(self.device)
        for _ in range(LEFT_OUT + 2):
            clock.note()
            if way == "deep copy":
                copy.deepcopy(model)
            else:
                tritter.expand(model, "llama_pro")
        clock.note()
        return clock.seconds()


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield a row for each model and way."""
    from tritter.core.families import Model, training_flops

    for name in options.models:
        measurement = Measurement(name, options)
        seconds = {way: list[float]() for way in options.ways}
        peaks = dict.fromkeys(options.ways, 0)
        for _ in range(options.rounds):
            for way in options.ways:
                seconds[way].append(measurement.seconds(way))
                if measurement.device == "cuda":
                    peaks[way] = torch.cuda.max_memory_allocated()
        length = options.sequence_length
        tokens = options.batch_size * length
        flops = training_flops(Model(measurement.config)).of_all({length: options.batch_size})
        device = torch.device(measurement.device)
        shown = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        known = [peak for part, peak in PEAKS.items() if part in shown]
        limit = options.peak_flops or next(iter(known), None)
        for way, found in seconds.items():
            other = seconds.get(WAYS[way], found)
            ratios = [own / theirs for own, theirs in zip(found, other, strict=True)]
            step, is_step = statistics.median(found), way not in NOT_STEPS
            is_whole = is_step and "LoRA" not in way  # a frozen base has fewer FLOPs
            yield {
                "device": shown,
                "model": name,
                "parameters": Model(measurement.config).num_parameters,
                "way": way,
                "ms": round(1e3 * step, 2),
                "tokens_per_second": round(tokens / step) if is_step else "",
                "mfu": round(flops / step / limit, 3) if limit and is_whole else "",
                "beside": WAYS[way],
                "ratio": round(statistics.median(ratios), 3),
                "lowest": round(min(ratios), 3),
                "highest": round(max(ratios), 3),
                "peak_gb": round(peaks[way] / 1e9, 2) or "",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["tritter_125m", "tritter_1b"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--accelerator", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--peak-flops", type=float, help="of the device, per second")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.shape = {}  # of the presets
    if options.accelerator == "gpu" and not torch.cuda.is_available():
        print("torch finds no GPU on this machine; nothing was measured")
        return
    tell(rows(options), options.output)


if __name__ == "__main__":
    main()
