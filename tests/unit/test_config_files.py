"""Reading: what files and overrides say works as their writer meant it, or one line says what to write."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_fast.config import Config, known_keys, load, merge
from metis_fast.config.load import ELSEWHERE
from metis_fast.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file of that name and returns its path."""

    def run(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return run


def refusal(*overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -- unknown keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("loss.w_tol=0.1", "loss.w_tool"),
        ("loss.wtool=0.1", "loss.w_tool"),
        ("train.w_tool=0.1", "loss.w_tool"),  # right leaf, wrong section
        ("w_tool=0.1", "loss.w_tool"),
        ("rolout.top_p=1", "rollout"),
        ("train.optim.learning_rate=1", "train.optim.lr"),
        ("train.learning_rate=1", "train.optim.lr"),
        ("sft.learning_rate=1", "sft.optim.lr"),
        ("rollout.num_generations=8", "rollout.rollouts_per_prompt"),
        ("tools.python.timeout=3", "tools.python.timeout_s"),
        ("loss.w-tool=0.1", "loss.w_tool"),
        ("loss/w_tool=0.1", "loss.w_tool"),
        ("LOSS.W_TOOL=0.1", "loss"),
        ("rollout.vllm.Max-Num-Seqs=1", "rollout.vllm.max_num_seqs"),
        ("sft.phases=[{trajectories: a, steps: 1, step: 2}]", "sft.phases.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override, nearest):
    message = refusal(override)
    assert "unknown key" in message and f"did you mean '{nearest}" in message


def test_names_of_other_trainers_lead_to_settings_that_there_are():
    assert set(ELSEWHERE.values()) <= set(known_keys())


def test_a_key_that_resembles_nothing_lists_the_sections():
    message = refusal("zzzzqqq=1")
    assert "unknown key 'zzzzqqq'; sections are run, data, model" in message


@given(st.sampled_from(known_keys()))
def test_every_known_key_exists(key):
    node = Config()
    for part in key.split("."):
        assert hasattr(node, part)
        node = getattr(node, part)


@given(st.sampled_from([key for key in known_keys() if "." in key and key.rsplit(".", 1)[1] != "phases"]))
def test_a_misspelt_leaf_is_refused_wherever_it_stands(key):
    assert "unknown key" in refusal(f"{key}x=1")


# -- overrides ------------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_last_one_counts(write):
    path = write("a.yaml", "loss: {w_tool: 0.3, eps_low: 0.1}\nrun: {seed: 5}\n")
    config = load(path, ["loss.w_tool=0.1", "loss.w_tool=0.2", "train.optim.lr=3e-5"])
    assert (config.loss.w_tool, config.loss.eps_low, config.run.seed, config.train.optim.lr) == (0.2, 0.1, 5, 3e-5)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("loss.dual_clip=.inf", lambda c: c.loss.dual_clip == math.inf),
        ("log.rollouts=false", lambda c: c.log.rollouts is False),
        ("data.train=[a.parquet, b]", lambda c: c.data.train == (Path("a.parquet"), Path("b"))),
        ("tools.enabled=[python]", lambda c: c.tools.enabled == ("python",)),
        ("tools.text_search.corpus=x=y", lambda c: c.tools.text_search.corpus == Path("x=y")),
        ("run.dir=runs/a b", lambda c: c.run.dir == Path("runs/a b")),
        ("train.optim={lr: 0.5}", lambda c: c.train.optim.lr == 0.5 and c.train.optim.grad_clip == 1.0),
        ("model.freeze=[]", lambda c: c.model.freeze == ()),
    ],
)
def test_an_override_is_text_or_yaml_in_brackets(override, read):
    assert read(load(None, [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.phases.0.steps=3", "a list is written whole: sft.phases=[...]"),
        ("train.optim.betas.0=0.9", "a list is written whole: train.optim.betas=[...]"),
        ("train.optim.betas=[0.9, 0.95, 1]", "train.optim.betas: expected 2 values, got 3"),
        ("my.yaml", "the config file stands before the settings"),
        ("run.dir=a\u2028b", "without control characters"),
        ("run.seed=-1", "run.seed"),
    ],
)
def test_an_override_of_another_form_is_told_what_to_write(override, message):
    assert message in refusal(override)


@pytest.mark.parametrize("override", ["loss.w_tool", "=3", "", "loss", "=", "loss.w_tool:0.2", "loss..w_tool=1", ".loss=1"])
def test_an_override_without_key_and_value_shows_the_form(override):
    assert "expected section.key=value, for example loss.w_tool=0.2" in refusal(override)


# -- base -----------------------------------------------------------------------------------------------------------------


def test_a_base_is_found_beside_its_file_and_merged_by_section(write):
    write("shared/low.yaml", "loss: {w_tool: 0.3, eps_low: 0.1}\ndata: {train: [a, b]}\n")
    write("shared/mid.yaml", "base: low.yaml\nloss: {w_tool: 0.4}\n")
    path = write("top.yaml", "base: shared/mid.yaml\ndata: {train: [c]}\n")
    config = load(path)
    assert (config.loss.w_tool, config.loss.eps_low, config.data.train) == (0.4, 0.1, (Path("c"),))


def test_bases_in_a_circle_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    assert "leads back to this file" in refusal(path=write("b.yaml", "base: a.yaml\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: missing.yaml", "cannot read config"),
        ("base: [a]", "`base` must be the path of another config"),
        ("- a\n- b", "expected sections like `loss:`, got ['a', 'b']"),
        ("loss: {", "is not valid YAML"),
        ("loss: 3", "line 1 of"),
        ("1: 2", "top.yaml"),
        ('base: "a\\0b"', "without control characters"),
        ('run: {dir: "\\UFFFFFFFF"}', "is no character"),
        ('run: {dir: "\\U00110000"}', "is no character"),
        ('run: {dir: "a\\Nb"}', "without control characters"),  # U+0085, which YAML reads as a line feed
        ("data:\n  train:\n    a.parquet\n    b.parquet", "begin each line of a list with `- `"),
        ("data: {train: ${HOME}/x}", "write $NAME, or quotes around ${NAME}"),
        ("train: {steps: 1,000}", "1000 or 0.2 for a number"),
        ("data: {train: a,b}", "between braces a comma ends the value: write [a, b]"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(write, text, message):
    path = write("top.yaml", text)
    got = refusal(path=path)
    assert message in got and ".yaml" in got


def test_an_empty_file_is_the_defaults(write):
    assert load(write("a.yaml", "")) == load(write("b.yaml", "# nothing\n")) == load(None) == Config()


def test_a_missing_file_is_named(tmp_path):
    assert f"cannot read config {tmp_path / 'no.yaml'}: No such file" in refusal(path=tmp_path / "no.yaml")


trees = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)
sections = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(sections, sections, sections)
def test_merging_is_associative_and_keeps_what_the_upper_layer_leaves_out(one, two, three):
    assert merge(one, {}) == merge({}, one) == one
    assert merge(one, one) == one
    merged = merge(one, two)
    assert merged.keys() == one.keys() | two.keys()
    assert all(merged[key] == one[key] for key in one.keys() - two.keys())
    if all(isinstance(v, dict) for t in (one, two, three) for v in t.values()):
        for key in merged:
            assert set(merged[key]) == set(one.get(key, {})) | set(two.get(key, {}))


# -- what the type of a setting makes of the text --------------------------------------------------------------------------


def both(key, text, write):
    """The setting from a command line and from a file."""
    section, _, name = key.rpartition(".")
    tree = f"{name}: {text}"
    for part in reversed(section.split(".")):
        tree = f"{part}: {{{tree}}}"
    configs = [load(None, [f"{key}={text}"]), load(write("one.yaml", tree))]
    for part in key.split("."):
        configs = [getattr(config, part) for config in configs]
    return configs


@pytest.mark.parametrize("text", ["2026-11-29", "007", "1e3", "on", "no", "4.5", "12:30", "0x1f", "true", "1_000"])
def test_text_and_paths_are_what_was_typed(text, write):
    assert both("run.dir", text, write) == [Path(text)] * 2
    assert both("score.llm.model", text, write) == [text] * 2
    assert both("data.train", text, write) == [(Path(text),)] * 2


@pytest.mark.parametrize("text", ["null", "~", "Null"])
def test_null_is_no_text_and_empties_what_may_be_empty(text, write):
    for key in ("run.dir", "score.llm.base_url"):
        section, _, name = key.rpartition(".")
        tree = f"{name}: {text}"
        for part in reversed(section.split(".")):
            tree = f"{part}: {{{tree}}}"
        for source in ((None, [f"{key}={text}"]), (write("one.yaml", tree), ())):
            with pytest.raises(
                ConfigError, match=f"{key}: expected text; leave the key out for its default, or write '{text}'"
            ):
                load(*source)
    assert both("data.train", text, write) == [(), ()]
    assert both("tools.text_search.corpus", text, write) == [None, None]


@pytest.mark.parametrize("text", ["inf", ".inf", "Infinity", "+.INF", "+inf", ".Inf"])
def test_infinity_has_many_spellings(text, write):
    assert both("loss.dual_clip", text, write) == [math.inf] * 2


@given(st.integers(0, 10**6), st.sampled_from(["{}", "{:_}", "{}.0", "{}e0", "+{}", "0{}", "{}0e-1"]))
def test_a_whole_number_is_one_however_it_is_written(number, form):
    assert load(None, [f"run.seed={form.format(number)}"]).run.seed == number


@given(st.floats(0, 1e6, allow_subnormal=False), st.sampled_from(["{!r}", "{:e}", "{:.20f}", "{:+}"]))
def test_a_number_is_one_however_it_is_written(number, form):
    text = form.format(number)
    assert load(None, [f"loss.w_tool={text}"]).loss.w_tool == float(text)


@pytest.mark.parametrize(
    "text", ["1.5", "1e-1", "1e30", "yes", "ten", "1,000", "0x10", "10%", ".inf", "1 000", "1k", "", "[1]"]
)
def test_what_is_no_whole_number_is_refused(text):
    assert "run.seed: " in refusal(f"run.seed={text}")


@pytest.mark.parametrize(
    ("text", "says"), [("15%", "write 0.15"), ("0.5%", "write 0.005"), ("0,2", "0.2 for two tenths"), ("1,000", "1000 for")]
)
def test_numbers_of_spreadsheets_say_how_they_are_written_here(text, says):
    assert says in refusal(f"loss.w_tool={text}")


@pytest.mark.parametrize("text", ["yes", "Yes", "on", "ON", "true", "TRUE", "1", "y"])
def test_yes_is_true(text, write):
    assert both("model.dtype", "float32", write) == ["float32"] * 2
    assert both("tools.python.unsafe", text, write) == [True] * 2


@pytest.mark.parametrize("text", ["no", "No", "off", "OFF", "false", "0", "n"])
def test_no_is_false(text, write):
    assert both("log.rollouts", text, write) == [False] * 2


def test_a_choice_may_be_a_word_that_yaml_takes_for_a_boolean(write):
    assert both("train.megatron.overlap_reduction", "on", write) == ["on"] * 2
    assert "'auto', 'on' or 'off'" in refusal("train.megatron.overlap_reduction=ON")


def test_off_is_also_minus_one_where_vllm_writes_that(write):
    assert both("rollout.top_k", "-1", write) == [0, 0]
    assert "rollout.top_k" in refusal("rollout.top_k=-2")


@pytest.mark.parametrize("text", ["", "null", "~", "Null"])
def test_nothing_is_none_where_that_is_a_value(text, write):
    assert both("tools.text_search.corpus", text, write) == [None] * 2
    assert both("rollout.vllm.arguments", text, write) == [{}] * 2
    assert load(write("a.yaml", f"rollout: {{vllm: {{speculative: {text}}}}}")).rollout.vllm.speculative is None


@pytest.mark.parametrize(
    "key", ["loss.w_tool", "run.seed", "run.dir", "log.rollouts", "model.dtype", "data.train", "train.optim.betas"]
)
def test_nothing_is_refused_elsewhere(key):
    message = refusal(f"{key}=")
    assert f"{key}: " in message and "got nothing" in message


def test_quotes_keep_null_and_commas_as_text(write):
    path = write("a.yaml", "tools: {text_search: {corpus: 'null'}}\ndata: {train: 'a,b', heldout: ['c,d', e]}")
    config = load(path)
    assert config.tools.text_search.corpus == Path("null")
    assert (config.data.train, config.data.heldout) == ((Path("a,b"),), (Path("c,d"), Path("e")))
    assert load(None, ["data.train='a,b'"]).data.train == (Path("a,b"),)


def test_one_value_is_a_list_of_one_and_commas_separate(write):
    assert both("tools.enabled", "python", write) == [("python",)] * 2
    assert load(None, ["tools.enabled=python,text_search"]).tools.enabled == ("python", "text_search")
    assert load(write("a.yaml", "data:\n  train: a.parquet, b\n")).data.train == (Path("a.parquet"), Path("b"))
    assert load(None, ["train.optim.betas=0.9, 0.95"]).train.optim.betas == (0.9, 0.95)
    assert load(write("b.yaml", "sft: {phases: {trajectories: a, steps: 3, abilities: math}}")).sft.phases[0].abilities == (
        "math",
    )
    assert load(write("c.yaml", "data:\n  train:\n  - a\n  - b\n")).data.train == (Path("a"), Path("b"))
    assert "betas.1: expected a value" in refusal("train.optim.betas=0.9")


def test_what_no_type_knows_is_what_yaml_says_and_numbers_with_exponents():
    values = "{a: off, b: 1e-3, c: 8, d: x, e: '1', f: null, g: 2026-11-29, h: 1.5}"
    arguments = load(None, [f"rollout.vllm.arguments={values}", "rollout.vllm.arguments.i=On"]).rollout.vllm.arguments
    assert arguments == {"a": False, "b": 1e-3, "c": 8, "d": "x", "e": "1", "f": None, "g": "2026-11-29", "h": 1.5, "i": True}
    assert "rollout.vllm.arguments.a: expected a number, true, false or text" in refusal("rollout.vllm.arguments={a: [1]}")


# -- paths ----------------------------------------------------------------------------------------------------------------


def test_home_and_variables_in_paths_are_filled_in(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert both("run.dir", "~/runs", write) == [tmp_path / "runs"] * 2
    assert both("run.dir", "$SCRATCH/a", write) == both("run.dir", "'${SCRATCH}/a'", write) == [Path("/scratch/a")] * 2
    assert both("run.dir", "a$$b", write) == [Path("a$b")] * 2
    assert load(None, ["data.train=[~/a, $SCRATCH/b]"]).data.train == (tmp_path / "a", Path("/scratch/b"))
    assert load(None, ["score.llm.api_key_env=$SCRATCH"]).score.llm.api_key_env == "$SCRATCH"  # no path
    low = write("low.yaml", "loss: {w_tool: 0.3}")
    assert load(write("top.yaml", "base: ~/low.yaml")).loss.w_tool == load(write("b.yaml", f"base: {low}")).loss.w_tool == 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("$METIS_NO_SUCH/a", "the environment variable METIS_NO_SUCH is not set"),
        ("${METIS_NO_SUCH:-a}", "expected $NAME or ${NAME}"),
        ("cost$", "$$ for a dollar sign"),
        ("~no-such-user/a", "write ./~no-such-user/a"),
    ],
)
def test_a_path_that_cannot_be_filled_in_is_refused(text, says, write):
    assert "METIS_NO_SUCH" not in os.environ
    assert says in refusal(f"run.dir={text}")
    assert says in refusal(path=write("a.yaml", f"base: {text}\n"))


@pytest.mark.parametrize("text", ['"a\\0b"', '"a\\nb"', '"\\x1b[1m"'])
def test_control_characters_are_no_part_of_a_path(text, write):
    assert (
        "line 1 of" in (message := refusal(path=write("a.yaml", f"run: {{dir: {text}}}"))) and "control characters" in message
    )


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfloss: {w_tool: 0.4}\n",  # a byte-order mark
        b"loss:\r\n  w_tool: 0.4\r\n",
        b"%YAML 1.2\n---\nloss: {w_tool: 0.4}\n...\n",
        b'{"loss": {"w_tool": 0.4}}',
        b"loss:\n  w_tool: |\n    0.4\n",
        b"loss: {<<: {w_tool: 0.1, eps_low: 0.2}, w_tool: 0.4}\n",
        b"loss: &l {w_tool: 0.4}\nscore:\ngate: ~\nsync: {}\n",
    ],
)
def test_files_of_many_makers_are_read(data, write):
    assert load(write("a.yaml", data)) == load(None, ["loss.w_tool=0.4"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("loss: {}\n# caf\u00e9\n".encode("latin-1"), "line 2 of {path} is not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("loss: {}\n".encode("utf-16"), "{path} is not text, or not UTF-8"),
        ("loss: {}\n".encode("utf-16-be"), "{path} is not text, or not UTF-8"),
        (bytes(range(256)), "{path} is not text, or not UTF-8"),
        (b"loss: {}\x07", "{path} is not text: it has the character U+0007"),
        (b"loss:\n\tw_tool: 1\n", "line 2 of {path} is not valid YAML: "),
        (b"loss: {w_tool: 1\ntrain: 3\n", "{path} is not valid YAML: "),
        (b"loss: {}\n---\nloss: {}\n", "line 2 of {path} is not valid YAML: expected a single document"),
        (
            b"loss: !!python/object:os.system {}\n",
            "line 1 of {path} is not valid YAML: remove the tag !!python/object:os.system",
        ),
        (b"run: {seed: !!int 3}\n", "remove the tag !!int"),
        (b"!!binary x: 3\n", "remove the tag !!binary"),
        (b"? [a]\n: 3\n", "line 1 of {path} is not valid YAML: expected the name of a setting"),
        (b"loss: *nowhere\n", "line 1 of {path} is not valid YAML: found undefined alias"),
        (b"loss: &a {w_tool: *a}\n", "{path} is not valid YAML: nested too deeply, or an anchor that contains itself"),
        (b"[" * 5000, "{path} is not valid YAML: nested too deeply"),
        (b"loss: {<<: 3}\n", "line 1 of {path} is not valid YAML: "),
        (b"base: a.yaml\nvariants: {a: {}}\n", "{path} is an ablation, and no config: run it with metis-fast ablate {path}"),
        (b"hello\n", "{path}: expected sections like `loss:`, got 'hello'"),
        (b"loss:\n  w_tool:0.2\n", "line 1 of {path}: loss is a section: expected settings like loss.w_acc, got 'w_tool:0.2'"),
        (b"loss: {w_tool:0.2}\n", "a blank stands behind the colon"),
        (b"run: {}\nloss: [w_tool]\n", "line 2 of {path}: loss is a section"),
        (
            b"run: {}\n\nloss.w_tool: 0.2\n",
            "line 3 of {path}: unknown key 'loss.w_tool'; in a file write loss: {{w_tool: ...}}",
        ),
        (b"train.optim.lr: 1\n", "in a file write train: {{optim: {{lr: ...}}}}"),
        (b"1: x\n", "line 1 of {path}: unknown key '1'"),
        (b"null: x\n", "line 1 of {path}: unknown key 'null'"),
        (b"loss:\n  base: x\n", "`base: other.yaml` stands at the top of a file"),
        (b"run: {}\nloss:\n  eps_low: 1\n  w_tool: much\n", "line 4 of {path}: loss.w_tool: "),
        (b"data:\n  train:\n  - a\n  - {b: 1}\n", "line 4 of {path}: data.train.1: expected a path"),
        (
            b"sft:\n  phases:\n  - {trajectories: a, steps: 1}\n  - {}\n",
            "line 4 of {path}: sft.phases.1.trajectories: expected a value",
        ),
        (b"base: [a]\n", "line 1 of {path}: `base` must be the path of another config"),
        (b"run: {}\nbase:\n", "line 2 of {path}: base: expected a path, got nothing"),
        (b"base: none.yaml\n", "none.yaml (`base` in line 1 of {path}): No such file"),
        (b"base: .\n", "(`base` in line 1 of {path}): Is a directory"),
    ],
)
def test_a_fault_of_a_file_is_named_with_its_line(data, says, write, tmp_path):
    path = write("a.yaml", data)
    assert says.format(path=path) in refusal(path=path)


def test_a_folder_is_no_config(tmp_path):
    assert f"cannot read config {tmp_path}: Is a directory" in refusal(path=tmp_path)


@given(st.sampled_from([key for key in known_keys() if "." in key]), st.booleans())
def test_what_is_given_twice_is_refused_wherever_it_stands(tmp_path_factory, key, leaf):
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    twice = [*lines, *[f"{'  ' * len(sections)}{name}:"] * 2] if leaf else [*lines, f"{'  ' * len(sections)}{name}:", *lines]
    path = tmp_path_factory.getbasetemp() / "twice.yaml"
    path.write_text("\n".join(twice))
    line = len(sections) + 2
    twin = name if leaf else sections[0]
    assert f"line {line} of {path} is not valid YAML: {twin!r} is given twice, first in line" in refusal(path=path)


def test_also_a_base_and_what_is_merged_in_are_given_once(write):
    for text in ("base: a\nrun: {}\nbase: b", "loss: {<<: {w_tool: 1, w_tool: 2}}", "loss: {w_tool: 1, 'w_tool': 2}"):
        assert "is given twice" in refusal(path=write("a.yaml", text))
    assert "is given twice" in refusal("loss={w_tool: 1, w_tool: 2}")


def test_an_empty_section_changes_nothing_of_its_base(write):
    write("low.yaml", "loss: {w_tool: 0.3}\nrollout: {vllm: {replicas: 2}}")
    config = load(write("top.yaml", "base: low.yaml\nloss:\nrollout: {vllm: }\n"), ["loss="])
    assert (config.loss.w_tool, config.rollout.vllm.replicas) == (0.3, 2)


def test_a_fault_is_found_in_the_file_that_has_it_or_in_the_override(write):
    low = write("low.yaml", "loss:\n  w_tool: x\n")
    top = write("top.yaml", "base: low.yaml\ntrain:\n  steps: 0\n")
    message = refusal("loss.w_tol=1", path=top)
    for part in (f"line 2 of {low}: loss.w_tool", f"line 3 of {top}: train.steps", "override 'loss.w_tol=1': unknown key"):
        assert part in message
    assert str(low) not in refusal("loss.w_tool=0.1", path=top)  # which the override mends
    assert "override 'loss.w_tool=y': loss.w_tool" in refusal("loss.w_tool=y", path=top)


@given(st.binary(max_size=60) | st.text("loss: {}[]w_tol.\n\t-&*!|>'\"#%@0123", max_size=60).map(str.encode))
def test_no_file_ends_in_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(load(path), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@given(st.sampled_from(known_keys()), st.text(max_size=20))
def test_no_override_ends_in_a_traceback(key, text):
    try:
        assert isinstance(load(None, [f"{key}={text}"]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
