"""The processor of `ray.data.llm`, on a real dataset, built by Ray's own `build_processor`."""

import subprocess
import sys
from pathlib import Path

import pytest

from cascade_model.errors import InputError
from cascade_model.llm import LLM
from cascade_model.sampling import SamplingParams
from cascade_model.weights import weights_digest
from tests.tiny_models import saved_text_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved_text_model(tmp_path_factory.mktemp("model") / "model")


def processor_of(model: str, **settings):
    from ray.data.llm import build_processor

    from jobs.ray_data_llm import CascadeProcessorConfig

    config = CascadeProcessorConfig(model=model, batch_size=4, **settings)
    return build_processor(
        config,
        preprocess=lambda row: {
            "prompt": row["question"],
            "sampling_params": {"max_tokens": 5 + row["id"] % 3, "seed": row["id"]},
        },
        postprocess=lambda row: {
            name: row[name] for name in ("id", "generated_text", "finish_reason", "seed", "passes")
        },
    )


def test_a_dataset_gains_the_answers_that_the_model_gives(model, ray_local):
    import ray

    rows = [{"id": i, "question": f"question {i}"} for i in range(11)]
    common = {"temperature": 1.0, "stop_at_eos": False}
    processor = processor_of(model, sampling_params=common)
    assert processor.list_stage_names() == ["CascadeStage"]
    found = sorted(processor(ray.data.from_items(rows)).take_all(), key=lambda row: row["id"])
    params = [
        SamplingParams(max_tokens=5 + i % 3, seed=i, temperature=1.0, stop_at_eos=False)
        for i in range(11)
    ]
    with LLM.load(model) as llm:
        wanted = llm.generate([row["question"] for row in rows], params)
    assert [row["generated_text"] for row in found] == [each.text for each in wanted]
    assert [row["passes"] for row in found] == [each.passes for each in wanted]
    assert [row["seed"] for row in found] == list(range(11))
    assert {row["finish_reason"] for row in found} == {"length"}


def test_a_row_that_cannot_be_answered_is_set_aside_where_that_is_wished(model, ray_local):
    import ray

    from jobs.ray_data_llm import CascadeProcessorConfig

    rows = [{"id": 0, "question": "a"}, {"id": 1, "question": "b" * 300}]
    processor = processor_of(model, should_continue_on_error=True)
    found = {row["id"]: row for row in processor(ray.data.from_items(rows)).take_all()}
    assert found[0]["__inference_error__"] == ""
    assert "refused: prompt of 300 tokens" in found[1]["__inference_error__"]
    assert CascadeProcessorConfig(model=model).should_continue_on_error is False


def test_a_wrong_setting_is_told_when_the_processor_is_built(model):
    with pytest.raises(InputError, match=r"temprature is no setting .* did you mean `temperature`"):
        processor_of(model, sampling_params={"temprature": 1.0})
    with pytest.raises(InputError, match="did you mean `max_sequences`"):
        processor_of(model, engine={"max_sequence": 4})


def test_equal_rows_have_equal_seeds_and_others_have_others(model):
    from jobs.ray_data_llm import CascadeUDF
    from pipelines.model_answers import ModelSource
    from pipelines.row_settings import Decoding

    common = Decoding(params=SamplingParams(temperature=1.0, max_tokens=8))
    udf = CascadeUDF("__data", [], ModelSource(model=model), common, False)
    chat = [{"role": "user", "content": "a"}]
    rows = [{"prompt": "a"}, {"prompt": "a", "other": 1}, {"prompt": "b"}, {"messages": chat}]
    seeds = [answer["seed"] for answer in udf._answers(rows)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    with pytest.raises(InputError, match=r"missing_prompt.*mend it or set"):
        udf._answers([{"text": "a"}])


def test_the_actors_take_the_weights_that_the_processor_was_built_with(model):
    stage = processor_of(model).get_stage_by_name("CascadeStage")
    assert stage.fn_constructor_kwargs["source"].weights_sha256 == weights_digest(model)


def test_vllm_is_not_needed():
    program = "import sys, jobs.ray_data_llm\nsys.exit('vllm' in sys.modules)"
    folder = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=folder).returncode == 0
