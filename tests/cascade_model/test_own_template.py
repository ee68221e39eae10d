"""Which chat template a model brings, and that a model folder's manifest must vouch for it."""

import json
import shutil

import pytest
import torch

from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.jinja_chat import PLAIN
from cascade_model.model import Transformer
from cascade_model.own_template import own_template, published_template, template_of
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import TEMPLATE, load_model, save_model, weights_digest
from tests.tiny_models import text_config

OWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A model folder with a template."""
    return written(tmp_path / "model", OWN)


def written(folder, template):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    save_model(folder, Transformer(text_config(tokenizer)), tokenizer, chat_template=template)
    return folder


def test_a_file_of_its_own_comes_before_the_tokenizers_settings(tmp_path):
    assert published_template(Folder(tmp_path)) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"model_max_length": 5}))
    assert published_template(Folder(tmp_path)) is None
    settings.write_text(json.dumps({"chat_template": "{{ one }}"}))
    assert published_template(Folder(tmp_path)) == "{{ one }}"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ two }}"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert published_template(Folder(tmp_path)) == "{{ two }}"
    (tmp_path / "chat_template.jinja").write_text("{{ three }}")
    assert published_template(Folder(tmp_path)) == "{{ three }}"


@pytest.mark.parametrize("text", ["{", '{"chat_template": [{}]}', "[]", '{"chat_template": [1]}'])
def test_a_damaged_one_is_refused(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match="damaged chat template"):
        published_template(Folder(tmp_path))


def test_a_model_folder_gives_back_the_template_that_it_was_written_with(folder, tmp_path):
    assert own_template(folder) == OWN
    load_model(folder)
    bare = written(tmp_path / "bare", None)
    assert own_template(bare) is None
    assert weights_digest(bare) != weights_digest(folder)


def test_a_template_that_the_manifest_does_not_vouch_for_is_refused(folder, tmp_path):
    bare = written(tmp_path / "bare", None)
    shutil.copy(folder / TEMPLATE, bare / TEMPLATE)
    with pytest.raises(CheckpointMismatch, match="its manifest does not name"):
        own_template(bare)
    (folder / TEMPLATE).write_text(f"{OWN} and obey")
    for read in (own_template, load_model):
        with pytest.raises(CheckpointMismatch, match=f"{TEMPLATE} with sha256"):
            read(folder)
    (folder / TEMPLATE).unlink()
    with pytest.raises(CheckpointMismatch, match=f"lacks {TEMPLATE}"):
        own_template(folder)


def test_the_chosen_template_comes_before_the_models_own_and_plain_is_the_last(folder, tmp_path):
    tokenizer = byte_tokenizer()
    assert template_of(folder, tokenizer).text == OWN
    assert template_of(folder, tokenizer, "plain").text == PLAIN
    bare = written(tmp_path / "bare", None)
    assert template_of(bare, tokenizer).text == PLAIN
    fixed = written(tmp_path / "fixed", "no markup, so it could be taken for a file")
    assert template_of(fixed, tokenizer).text.startswith("no markup")
