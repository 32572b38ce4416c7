"""How much of Tritter a run passes before its first training step, and `tritter expand` at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import oracle

ROOT = Path(__file__).parents[1]
WORDS = (
    *("expansion=width", "forgetting=[ewc,replay]", "logger=csv", "trainer.progress=off"),
    *("model.hidden_size=16", "model.num_attention_heads=2", "model.num_key_value_heads=1"),
    *("data.vocab_size=300", "pretraining.max_steps=1", "evaluation.sample_tokens=0"),
)
# Runs train.py up to one of its training steps, and prints what it had called before its first
TRACED = """
import json, os, runpy, sys
root, program, last = sys.argv.pop(1), sys.argv[1], int(sys.argv.pop(2))
seen, steps = set(), 0

def note(frame, event, _):
    global steps
    code = frame.f_code
    if event != "call" or not code.co_flags & 1 or not code.co_filename.startswith(root):
        return  # flag 1: of a function, not of a class or a module
    if code.co_name == "training_step":
        steps += 1
        if steps == 1:
            figures = len(seen), len({each.co_filename for each in seen})
            print(json.dumps(figures), flush=True)
        if steps == last:
            os._exit(0)
    seen.add(code)

sys.argv.pop(0)
sys.setprofile(note)
runpy.run_path(program, run_name="__main__")
"""
# Most functions and files: both may only fall (issue 42 raised them by `Model` and `Stage`,
# and stages that count their FLOPs for the announced time one file)
AT_MOST = {"nothing in the cache": (1_055, 101), "base from the cache": (1_628, 133)}

# Runs `tritter` with the given words; prints the number of its functions and of their calls
COUNTED = """
import collections, json, sys
root, calls = sys.argv.pop(1), collections.Counter()

def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_flags & 1 and code.co_filename.startswith(root):
        calls[code] += 1

from tritter.cli.main import app
sys.setprofile(note)
try:
    app()
finally:
    sys.setprofile(None)
    print(json.dumps((len(calls), calls.total())))
"""
EXPAND_AT_MOST = 666, 11_300  # functions and calls, for a Llama of three layers; may only fall


@pytest.mark.full
def test_few_functions_lead_to_the_first_training_step(tmp_path, capsys):
    """Pretraining takes one step, so the second one means that the base is in the cache."""
    for name, last in (("nothing in the cache", 2), ("base from the cache", 1)):
        own = (f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/{last}")
        place = (f"{ROOT}/tritter/", f"{ROOT}/train.py", str(last))
        done = subprocess.run(
            [sys.executable, "-c", TRACED, *place, *WORDS, *own], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        line = next(each for each in done.stdout.splitlines() if each.startswith("["))
        functions, files = json.loads(line)
        with capsys.disabled():
            print(f"\n{name}: {functions} functions in {files} files")
        assert functions <= AT_MOST[name][0] and files <= AT_MOST[name][1]


@pytest.mark.full
def test_few_calls_expand_a_small_model(tmp_path, capsys):
    source = oracle.saved(oracle.tiny_llama(num_hidden_layers=3), tmp_path / "source")
    words = ("expand", str(source), "--output", str(tmp_path / "out"))
    own = ("--method", "width", "--hidden-size", "36", "--num-heads", "6")
    code = [sys.executable, "-c", COUNTED, f"{ROOT}/tritter/"]
    done = subprocess.run([*code, *words, *own], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions, calls = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\ntritter expand: {functions} functions, {calls} calls")
    assert functions <= EXPAND_AT_MOST[0] and calls <= EXPAND_AT_MOST[1]
