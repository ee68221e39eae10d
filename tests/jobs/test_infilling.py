"""From rearranged documents to a model that fills holes by what follows them, and says that it can.

The texts are two equal capitals, two digits and the same letter twice in lower case, so the capital
before the digits can only be known from what follows them.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.errors import InputError
from cascade_model.llm import LLM
from cascade_model.sampling import SamplingParams
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import load_model, read_config
from jobs import prepare, pretrain
from pipelines.completions import claim
from pipelines.generation import PartWorker, Work
from pipelines.model_answers import ModelSource
from pipelines.prompt_rows import Columns
from pipelines.prompts import plan
from pipelines.row_settings import Decoding

TOKENIZER = byte_tokenizer().with_infill()
LETTERS = "abcdefgh"
SHAPE = ["--model.hidden-size", "48", "--model.num-layers", "2", "--model.num-heads", "4"]
SHAPE += ["--model.num-kv-heads", "4", "--model.head-dim", "16", "--model.intermediate-size", "96"]
STEPS = ["--trainer.num-steps", "160", "--trainer.sequences-per-step", "64", "--trainer.log-every"]
STEPS += ["50", "--trainer.sequences-per-forward", "64", "--optimizer.peak-lr", "0.01"]
GREEDY = SamplingParams(max_tokens=6, temperature=0, rule="sequential")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("infilling")
    texts = [
        c.upper() * 2 + a + b + c * 2 for c, a, b in itertools.product(LETTERS, *["0123456789"] * 2)
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


def trained(folder: Path, name: str, rate: float, block_size: int = 4) -> Path:
    """A model folder, trained on a corpus of which this share is rearranged."""
    corpus, run = str(folder / f"{name}-corpus"), str(folder / name)
    words = ["--source.paths", str(folder / "texts.jsonl"), "--output", corpus, "--runner", "local"]
    words += ["--tokenizer", str(folder / "tokenizer.json"), "--sequence-length"]
    words += [
        str(3 * block_size),
        "--noise.block-size",
        str(block_size),
        "--packing",
        "best_fit",
        "--infill-rate",
        str(rate),
    ]
    assert prepare.main(words) == 0
    words = ["--corpus", corpus, "--output", run, "--num-workers", "0", *SHAPE, *STEPS]
    assert pretrain.main(words) == 0
    return folder / name / "model"


@pytest.fixture(scope="module")
def filling(folder) -> Path:
    return trained(folder, "filling", 0.9)


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    return trained(folder, "plain", 0.0)


@pytest.fixture(scope="module")
def in_one_block(folder) -> Path:
    """Its blocks are longer than a text, so that it learns to see what follows a mask."""
    return trained(folder, "in-one-block", 0.0, block_size=8)


SUFFIXES = [f"{digits}{c * 2}" for c in LETTERS for digits in ("07", "58", "91")]


def share_right(llm: LLM, params: SamplingParams = GREEDY) -> float:
    """How often a hole before the digits is filled with the capitals of what follows."""
    answers = llm.generate([""] * len(SUFFIXES), params, suffix=SUFFIXES)
    wanted = [suffix[-1].upper() * 2 for suffix in SUFFIXES]
    return sum(a.text == w for a, w in zip(answers, wanted, strict=True)) / len(wanted)


def test_a_model_says_that_it_was_trained_so(filling, plain):
    shape = read_config(filling)
    assert (shape.infill, shape.infill_ids) == ("psm", TOKENIZER.infill_ids)
    assert read_config(plain).infill == "none"


def test_a_hole_is_filled_by_what_follows_it_only_after_such_training(filling, plain):
    with LLM.load(filling) as llm:
        assert share_right(llm) >= 0.9
        [without] = llm.generate(["AA07"], GREEDY)
        assert without.text == "aa"
    model, tokenizer = load_model(plain)
    model.config = dataclasses.replace(model.config, infill="psm", infill_ids=TOKENIZER.infill_ids)
    with LLM(model.eval(), tokenizer) as llm:
        assert share_right(llm) <= 2 / len(LETTERS)  # knowing nothing, 1 in 8
    with LLM.load(plain) as llm:
        [without] = llm.generate(["AA07"], GREEDY)
        assert without.text == "aa"
        with pytest.raises(InputError, match="or one that has infill=psm"):
            llm.generate([""], GREEDY, suffix="07aa")


def test_a_hole_is_filled_by_what_follows_it_in_its_block_or_seen_both_ways(in_one_block):
    params = dataclasses.replace(GREEDY, max_tokens=2)
    with LLM.load(in_one_block) as llm:
        assert share_right(llm, params) >= 0.9
        with pytest.raises(InputError, match="ends beyond the hole's block of block_size=8"):
            llm.generate([""], GREEDY, suffix="07aaa")
    model, tokenizer = load_model(in_one_block)
    model.config = dataclasses.replace(model.config, attention="bidirectional")
    with LLM(model.eval(), tokenizer) as llm:
        assert share_right(llm, params) >= 0.9


def test_the_prompt_is_what_training_saw(filling):
    """The tokens up to the middle are those of a rearranged document, so cut by cut the same."""
    corpus = Corpus.open(str(filling.parents[1] / "filling-corpus"))
    rows = corpus.rows(range(corpus.num_sequences))
    with LLM.load(filling) as llm:
        checked = 0
        for row, maskable in zip(rows.tokens.tolist(), rows.is_maskable, strict=True):
            if row[0] != TOKENIZER.infill_ids[0]:
                continue
            prefix, rest = split_at(row[1:], TOKENIZER.infill_ids[1])
            suffix, middle = split_at(rest, TOKENIZER.infill_ids[2])
            written = TOKENIZER.decode(prefix), TOKENIZER.decode(suffix)
            if suffix:
                assert llm.prompt_tokens(*written) == row[: row.index(TOKENIZER.infill_ids[2]) + 1]
                checked += 1
            assert middle[int(maskable[-len(middle) :].sum()) - 1] == TOKENIZER.eos_id
        assert checked > 400


def split_at(tokens: list[int], mark: int) -> tuple[list[int], list[int]]:
    place = tokens.index(mark)
    return tokens[:place], tokens[place + 1 :]


def small(corpus: Path, output: Path, *more: str) -> list[str]:
    """A run of two steps."""
    words = ["--corpus", str(corpus), "--output", str(output), "--num-workers", "0", *SHAPE]
    words += ["--trainer.num-steps", "2", "--trainer.sequences-per-step", "2", *more]
    return [*words, "--trainer.sequences-per-forward", "2"]


def test_going_on_from_a_model_learns_to_fill_or_may_unlearn_it(
    folder, filling, plain, tmp_path, capsys
):
    rearranged_texts, texts = (folder / f"{name}-corpus" for name in ("filling", "plain"))
    more = ["--initial-model", str(plain)]
    assert pretrain.main(small(rearranged_texts, tmp_path / "learns", *more)) == 0
    learned = load_model(tmp_path / "learns/model")[0].config
    assert learned == read_config(filling)
    assert "unlearn" not in capsys.readouterr().err
    more = ["--initial-model", str(filling)]
    assert pretrain.main(small(texts, tmp_path / "keeps", *more)) == 0
    assert load_model(tmp_path / "keeps/model")[0].config.infill == "psm"
    assert "may unlearn that" in capsys.readouterr().err


def test_rows_of_a_batch_have_suffixes(filling, plain, tmp_path):
    with LLM.load(filling) as llm:
        [wanted] = llm.generate([""], GREEDY, suffix="58cc")
        assert wanted.text == "CC"
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "", "suffix": "58cc"}, {"prompt": "AA07"}, {"prompt": "", "suffix": ""},
            {"messages": [{"role": "user", "content": "a"}], "suffix": "b"},
            {"prompt": "a", "suffix": 5}, {"prompt": "AA07", "suffix": None}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts, _ = plan([str(path)], 10)
    for model, texts in ((filling, ["CC", "aa", "aa"]), (plain, ["aa", "aa"])):
        output = tmp_path / model.parent.name
        claim(Folder(output), {}, {})
        work = Work(
            source=ModelSource(model=str(model)),
            output=str(output),
            columns=Columns(),
            common=Decoding(params=GREEDY),
            format="jsonl",
            rows_per_part=10,
        )
        record = PartWorker(work).answer(parts[0])
        lines = (output / record.file["name"]).read_text().splitlines()
        assert [json.loads(line)["completion"] for line in lines] == texts
        dead = {"empty_prompt": 1, "suffix_is_no_string": 1, "suffix_of_a_chat": 1}
        assert record.dead == dead | ({"refused": 1} if model == plain else {})
