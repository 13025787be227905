"""What was verified of the published formats, line by line: each has a test here, or names the one that stands elsewhere.

Lines of the reference's source that touch nothing of ours are left out: its HTTP interface, its readers, its own mistakes.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path

import pytest

from metis_fast.config import Config, load

_TESTS, _CONFIGS = Path(__file__).parents[1], Path(__file__).parents[2] / "configs"

# line -> tests that show it, as file::test
ELSEWHERE = {
    # 1. Metis-RL
    "binary images and images as integers are the same set": [
        "unit/test_data_published.py::test_integers_and_binary_are_the_same_set"
    ],
    "every message is split at <image>": ["unit/test_chat.py::test_prompt_ids_are_those_of_the_tokenizers_own_chat_template"],
    "read are prompt, images, ground truth, data source and extra_info": [
        "unit/test_data_published.py::test_a_published_row_keeps_all_that_it_says"
    ],
    "of a list of truths one match is enough": [
        "unit/test_score_published.py::test_of_several_truths_each_is_one_request_and_one_match_is_enough"
    ],
    "extra_info.index is the key of image search": [
        "unit/test_search_lookup.py::test_titles_and_images_of_the_rows_index_come_in_order"
    ],
    "the system message is plain text, without a schema of tools": [
        "unit/test_real_vocabulary.py::test_a_prompt_has_the_ids_of_its_whole_text_and_cannot_spell_control_tokens"
    ],
    "all tools answer in every row, whatever it offers": [
        "unit/test_protocol_metis.py::test_a_row_may_call_what_its_system_message_does_not_offer"
    ],
    # 2. Metis-ColdStart
    "roles are system, user, assistant; a tool role is a user turn": [
        "unit/test_sft_parts.py::test_a_conversation_is_the_template_with_loss_on_what_the_assistant_says"
    ],
    "search results in <tool_response>, as in the relative's form": [
        "unit/test_sft_parts.py::test_tags_in_an_observation_are_text_but_for_the_response_around_it"
    ],
    # 3. turns
    "a message ends at the string </tool_call>, which is kept": [
        "unit/test_stop_strings.py::test_a_call_whose_closing_tag_is_spelt_in_several_tokens_is_run",
        "unit/test_real_vocabulary.py::test_a_message_ends_with_the_string_however_it_is_tokenised",
    ],
    "or at the end of text": ["unit/test_protocol_metis.py::test_end_of_text_ends_a_message_too"],
    "an observation is a user turn without <tool_response>": [
        "unit/test_protocol_metis.py::test_a_conversation_token_for_token"
    ],
    "the last call of the message is parsed, as strict JSON": [
        "unit/test_protocol_metis.py::test_the_last_call_of_a_message_counts"
    ],
    "ten calls and one more message": [
        "unit/test_protocol_metis.py::test_ten_calls_make_eleven_messages_and_a_call_in_the_eleventh_is_not_run_and_does_not_count"
    ],
    "a long text keeps its last tokens, and a mark": [
        "unit/test_protocol_metis.py::test_of_a_long_text_the_end_is_kept_and_a_mark_stands_behind_it"
    ],
    "with images the first tokens are kept, whole images only": [
        "unit/test_protocol_metis.py::test_with_images_the_beginning_is_kept_and_images_are_whole"
    ],
    "calls that failed count, an unclosed one does not": [
        "unit/test_protocol_metis.py::test_calls_that_fail_count_as_calls",
        "unit/test_protocol_metis.py::test_a_call_that_is_never_closed_is_none",
        "unit/test_protocol_metis.py::test_a_call_that_is_cut_off_does_not_count",
    ],
    "an unparsable call: an empty user turn": [
        "unit/test_protocol_metis.py::test_a_malformed_call_is_told_what_is_wrong_and_an_empty_turn_where_strict"
    ],
    "an unknown tool: no handler": ["unit/test_protocol_metis.py::test_an_unknown_tool_is_unknown_whatever_its_arguments_are"],
    "arguments that are no object: an empty turn, and the end": [
        "unit/test_protocol_metis.py::test_arguments_that_are_no_object_are_told_and_end_the_rollout_where_strict"
    ],
    "a tool server that is down: a sentence, and the end": [
        "unit/test_protocol_metis.py::test_a_dead_tool_server_has_no_verdict_and_is_judged_where_strict"
    ],
    # 3. python
    "names are ready": ["e2e/test_python_published.py::test_names_are_ready"],
    "image_1 is as the model sees it": ["e2e/test_python_published.py::test_a_seen_image_has_the_pixels_that_the_model_gets"],
    "images come from plt.show(), display and a last expression": [
        "e2e/test_python_published.py::test_display_shows_images_and_figures_and_prints_everything_else"
    ],
    "code is dedented": ["unit/test_protocol_metis.py::test_one_argument_counts_and_others_are_ignored"],
    "all images are dropped if the call fails": ["unit/test_protocol_metis.py::test_images_of_code_that_fails_are_dropped"],
    "both blocks always, images behind them": [
        "unit/test_protocol_metis.py::test_images_of_python_stand_behind_both_blocks_one_after_the_other",
        "e2e/test_python_published.py::test_streams_are_apart_and_a_value_has_no_line_break",
    ],
    # 3. search
    "ten results, repeats skipped, ranks kept": ["unit/test_protocol_metis.py::test_a_conversation_token_for_token"],
    "double quotes are removed, over 1,000 characters refused": [
        "unit/test_search_providers.py::test_double_quotes_are_removed_and_a_query_that_is_long_or_empty_is_the_agents_mistake"
    ],
    "serper": ["unit/test_search_providers.py::test_serper_gets_the_query_and_the_number_and_the_key_in_its_header"],
    "Bright Data and SerpApi, hl and gl": [
        "unit/test_search_providers.py::test_brightdata_and_serpapi_search_google_in_the_language_of_the_query"
    ],
    "the reference's cache of searches": ["unit/test_search_cache.py::test_the_references_cache_is_asked_behind_ours"],
    "image search looks up, and shows pages by rank": [
        "unit/test_search_lookup.py::test_titles_and_images_of_the_rows_index_come_in_order",
        "unit/test_protocol_metis.py::test_image_search_shows_pages_by_rank_and_leaves_out_those_without_an_image",
    ],
    "a row that its cache does not have": [
        "unit/test_search_lookup.py::test_a_row_that_the_cache_does_not_have_has_no_results"
    ],
    # 3. sizes
    "RGBA lies on white": ["unit/test_pixels.py::test_alpha_lies_on_white"],
    "an aspect above 200 is squeezed": [
        "unit/test_protocol_metis.py::test_an_image_that_alone_would_not_fit_is_scaled_and_one_that_is_too_long_is_squeezed"
    ],
    # 4. reward
    "the whole response is judged, observations and role words included": [
        "unit/test_score_published.py::test_it_is_the_whole_response_with_observations_and_the_role_words_of_the_chat"
    ],
    "the first answer counts": ["unit/test_score_published.py::test_the_first_answer_is_what_the_pattern_finds"],
    "no answer, question or truth: 0 without a call": [
        "unit/test_score_published.py::test_without_answer_question_or_truth_it_is_wrong_and_no_judge_is_asked"
    ],
    "a model judges every row": ["unit/test_score_published.py::test_every_row_is_judged_by_the_model_whatever_its_style"],
    "system and user message, temperature 0": [
        "unit/test_score_published.py::test_the_request_is_a_system_and_a_user_message_at_temperature_0"
    ],
    "the model is the one that the endpoint has": [
        "unit/test_score_llm_models.py::test_the_one_that_is_served_is_taken_with_one_request"
    ],
    "CORRECT after strip, in any case": ["unit/test_score_published.py::test_the_word_counts_after_strip_and_in_any_case"],
    "the format counts tags": [
        "unit/test_score_published.py::test_the_format_of_the_reference_counts_tags",
        "unit/test_score_published.py::test_the_format_of_the_reference_is_a_matter_of_counts_behind_the_last_reason",
    ],
    # 6. weights
    "ids of control tokens and tags": ["unit/test_real_vocabulary.py::test_the_ids_are_the_published_ones"],
    "images in the template": ["unit/test_chat.py::test_prompt_ids_are_those_of_the_tokenizers_own_chat_template"],
    "the published end of a message": ["unit/test_model_folder.py::test_an_end_that_is_not_that_of_messages_is_a_warning"],
}


@lru_cache
def names_in(file: str) -> frozenset[str]:
    """Names of the tests of a file that the quick suite runs."""
    tree = ast.parse((_TESTS / file).read_text(encoding="utf-8"))
    found = [one for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return frozenset(
        one.name for one in found if not any(ast.unparse(mark).endswith("mark.slow") for mark in one.decorator_list)
    )


@pytest.mark.parametrize("line", ELSEWHERE)
def test_a_line_that_is_shown_elsewhere_has_its_test_there(line: str) -> None:
    for name in ELSEWHERE[line]:
        file, _, test = name.partition("::")
        assert test in names_in(file), f"{name} is gone; name what shows now: {line}"


@pytest.fixture(scope="module")
def paper() -> Config:
    return load(_CONFIGS / "qwen3vl_8b_hdpo.yaml")


def test_limits_of_prompt_response_observation_and_turns(paper: Config) -> None:
    rollout = paper.rollout
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens, rollout.max_observation_tokens) == (24576, 16384, 8192)
    assert rollout.max_turns == 10 and rollout.protocol == "metis" and not rollout.strict


def test_ten_results_and_twenty_seconds_of_python(paper: Config) -> None:
    assert paper.tools.text_search.max_results == 10 and paper.tools.python.timeout_s == 20


def test_a_model_judges_every_row_within_thirty_seconds(paper: Config) -> None:
    assert paper.score.judge == "llm" and paper.score.llm.timeout_s == 30


def test_the_vision_tower_is_trained_at_a_constant_rate_for_two_hundred_steps(paper: Config) -> None:
    assert paper.model.freeze == () and paper.train.steps == 200
    assert paper.train.optim.final_lr == 1 and paper.train.optim.warmup_steps == 0


def test_the_cold_start_is_that_of_the_nearest_relative() -> None:
    sft = load(_CONFIGS / "qwen3vl_8b_sft.yaml").sft
    assert sft.freeze == ("vision",) and sft.phases[0].epochs == 3
    assert (sft.optim.lr, sft.optim.schedule, sft.optim.final_lr) == (1e-5, "cosine", 0)
    assert sft.longest == 20480 and sft.image_max_pixels == 262144


def test_the_models_config_is_the_official_file() -> None:
    tree = json.loads((_CONFIGS / "qwen3vl_8b.json").read_text(encoding="utf-8"))
    official = json.dumps(tree, indent=2) + "\n"
    assert hashlib.sha256(official.encode()).hexdigest().startswith("5cd452860dc1")
