"""A user's own script runs vLLM through `metis_fast.rollout.vllm.library` on a machine whose caches are empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_shape import HEADS_OF_32, TEXTS

from metis_fast.testing.tiny import build_tiny

_SCRIPT = """
import sys
from metis_fast.rollout.vllm.library import load

vllm = load()
llm = vllm.LLM(sys.argv[1], dtype="float32", max_model_len=256, max_num_seqs=2, enforce_eager=True,
               limit_mm_per_prompt={"image": 1, "video": 0}, mm_processor_kwargs={"use_fast": False})
out = llm.generate([{"prompt_token_ids": [5, 6, 7]}], vllm.SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
print(len(out[0].outputs[0].token_ids))
"""

# vLLM itself takes long to import; the folder is set before
_FOLDER = """
import contextlib, os, sys
sys.modules["vllm"] = None
from metis_fast.errors import EngineError
from metis_fast.rollout.vllm import library
with contextlib.suppress(EngineError):
    library.load()
print(os.environ["%s"])
"""


@pytest.mark.slow  # in quick tests sync_vllm_process.py is such a script
def test_a_script_of_a_user_runs_vllm_on_an_empty_machine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    build_tiny(tmp_path / "model", HEADS_OF_32, TEXTS * 5, seed=0)
    (tmp_path / "script.py").write_text(_SCRIPT)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "XDG_", "HF_"))}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "model"],
        env=ours | {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-1] == "4"


def test_code_that_was_compiled_for_other_instructions_is_not_found(tmp_path: Path) -> None:
    """torch's cache does not tell them apart: with AVX2 allowed and then not, vLLM died of what was there."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    script = _FOLDER % name
    folders = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"ATEN_CPU_CAPABILITY": allowed, name: str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for allowed in ("default", "avx2")
    }
    assert folders == {str(tmp_path / "default"), str(tmp_path / "avx2")}
