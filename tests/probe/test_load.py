"""Any model by its configuration: a pipeline or a bare transformer, a folder or a hub id; the rest gets a sentence."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import probe
from probe.errors import ModelError
from probe.models.load import MINIATURE, checkpoints_of
from probe.models.registry import FAMILIES
from recipes.checkup import described, examine
from tests import tiny
from tests.toys import MODULES, Case, wan

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline with two transformers, its heavy parts deleted: they are not needed."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    wan.pipeline(boundary=0.9).save_pretrained(folder)
    for part in ("text_encoder", "vae"):
        (folder / part / CONFIG).unlink()
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    return folder


@pytest.fixture
def bare(saved, tmp_path):
    """A transformer of a family, in a folder of its own."""
    return Path(shutil.copytree(saved / "transformer", tmp_path / "bare"))


def refusal(model):
    """What is said of a model, one sentence without line breaks."""
    with pytest.raises(ModelError) as caught:
        examine(str(model), "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pipeline_is_examined_without_its_text_encoder(saved):
    findings = examine(str(saved), "cpu")
    assert all(finding.passed for finding in findings), findings
    assert len(findings) == 2 * 6
    first, second = findings[0], findings[6]
    expected = f"{sum(p.numel() for p in wan.transformer().parameters()):,} parameters in float32"
    assert first.sentence == f"Wan: 2 layers x 2 heads x 12 (2 self, 2 cross attention), {expected}"
    assert (first.check, second.check) == ("transformer family", "transformer_2 family")
    with pytest.raises(ModelError, match="A pipeline must load with diffusers"):
        probe.load(str(saved), device="cpu")


def test_a_bare_transformer_is_examined(saved, bare, tmp_path):
    """From its own folder, or from the subfolder of one without an index."""
    shutil.copytree(saved / "transformer", tmp_path / "outer" / "transformer")
    for place in (bare, tmp_path / "outer"):
        findings = examine(str(place), "cpu")
        assert all(finding.passed for finding in findings), findings
        assert [finding.check for finding in findings][:2] == ["family", "kernel"]


def test_the_weights_are_those_of_the_folder(saved):
    high, low = checkpoints_of(str(saved))
    for checkpoint, seed in ((high, 1), (low, 4)):
        loaded = checkpoint.load(device="cpu").transformer
        assert not loaded.training
        for name, weight in wan.transformer(seed).named_parameters():
            assert torch.equal(loaded.get_parameter(name), weight)


def test_parts_that_must_stay_float32_do(bare):
    model = checkpoints_of(str(bare))[0].load(device="cpu", dtype=torch.bfloat16).transformer
    assert model.dtype == model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].norm2.weight.dtype == torch.float32
    assert described(model).endswith("parameters in bfloat16")


@pytest.mark.parametrize("layers", [1, 5])
def test_any_size_goes(tmp_path, layers):
    tiny.transformer(layers=layers).save_pretrained(tmp_path / "odd")
    findings = examine(str(tmp_path / "odd"), "cpu")
    assert findings[0].sentence.startswith(f"CogVideoX: {layers} layers x 2 heads x 16 ({layers} joint attention), ")
    assert all(finding.passed for finding in findings), findings


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU
@pytest.mark.parametrize("module", MODULES)
def test_every_family_goes(module, tmp_path):
    toy = Case(module).toy
    toy.pipeline().transformer.save_pretrained(tmp_path / "bare")
    findings = examine(str(tmp_path / "bare"), "cpu")
    assert findings[0].sentence.startswith(f"{toy.FAMILY}: {toy.LAYERS} layers x 2 heads x ")
    assert all(finding.passed for finding in findings), findings


def test_the_miniature_is_a_model():
    (checkpoint,) = checkpoints_of("miniature")
    assert (checkpoint.family.name, checkpoint.model, checkpoint.part) == ("CogVideoX", str(MINIATURE), "transformer")


@contextmanager
def json_of(file):
    """Change a configuration."""
    config = json.loads(file.read_text())
    yield config
    file.write_text(json.dumps(config))


def test_an_unknown_class_lists_the_known_ones(bare):
    for name in ("UNet2DConditionModel", None):
        with json_of(bare / CONFIG) as config:
            config["_class_name"] = name
        said = refusal(bare)
        assert f"Got {name}. Known: " in said
        assert all(f"{family.name} ({family.transformer})" in said for family in FAMILIES)


def test_a_pipeline_of_another_kind_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    channels = {"block_out_channels": (4, 4), "norm_num_groups": 2, "attention_head_dim": 2}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet: torch.nn.Module = UNet2DModel(sample_size=8, **channels, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: 1 / 0)
    for said in (refusal(tmp_path / "unet"), refused_by_load(tmp_path / "unet")):
        assert "A pipeline must have a transformer. Got DDPMPipeline with scheduler, unet. Known: " in said
        assert "Wan (WanTransformer3DModel)" in said


def refused_by_load(folder):
    with pytest.raises(ModelError) as caught:
        probe.load(str(folder), device="cpu")
    return str(caught.value)


def test_a_folder_without_a_configuration(bare):
    (bare / CONFIG).unlink()
    assert "must hold model_index.json (a pipeline) or config.json (a transformer)" in refusal(bare)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{oops", "A configuration must be JSON. Got "),
        (b"", "A configuration must be JSON. Got "),
        (b"\xff\xfe", "A configuration must be JSON. Got "),
        (b"[1]", "A configuration must be a JSON object. Got "),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, "model_index.json"])
def test_a_configuration_that_cannot_be_read(bare, name, text, sentence):
    (bare / name).write_bytes(text)
    said = refusal(bare)
    assert sentence in said
    assert str(bare / name) in said


def test_weights_that_are_not_there(bare):
    whole = (bare / WEIGHTS).read_bytes()
    (bare / WEIGHTS).write_bytes(whole[:500])
    assert f"A transformer must load with diffusers. Got {bare}: OSError" in refusal(bare)
    (bare / WEIGHTS).unlink()
    assert f"Got {bare}: OSError: Error no file named {WEIGHTS}" in refusal(bare)


def test_what_a_library_says_is_put_on_one_line(bare, monkeypatch):
    def several(*_, **__):
        raise OSError("Not\n  here.\n")

    monkeypatch.setattr("diffusers.WanTransformer3DModel.from_pretrained", several)
    assert f"Got {bare}: OSError: Not here. Check the id or folder" in refusal(bare)


def test_a_pipeline_whose_second_transformer_is_missing(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("transformer_2"))
    assert f"A transformer must load with diffusers. Got {copy}" in refusal(copy)


def test_a_weight_is_missing(bare):
    weights = load_file(bare / WEIGHTS)
    del weights["blocks.1.attn2.to_k.weight"]
    save_file(weights, bare / WEIGHTS)
    said = refusal(bare)
    assert (
        f"every weight of its WanTransformer3DModel. Got {bare} without 1 of them, blocks.1.attn2.to_k.weight" in said
    )


def test_weights_of_another_shape(bare):
    with json_of(bare / CONFIG) as config:
        config["ffn_dim"] = 64
    assert "expected shape torch.Size([64" in refusal(bare)


@pytest.mark.parametrize("model", ["", "./nowhere", "no/such/folder", "nowhere"])
def test_a_place_that_is_none(model):
    assert f"A model must be 'miniature', a folder or a hub id (owner/name). Got {model}" in refusal(model)


def test_a_file_is_no_model(bare, monkeypatch):
    """Even one whose path looks like a hub id."""
    monkeypatch.chdir(bare.parent)
    for file in (bare / WEIGHTS, f"bare/{WEIGHTS}"):
        assert f"Got {file}, which is none of these" in refusal(file)


def test_a_hub_id_without_a_connection():
    said = refusal("nobody/nothing")
    assert (
        "on the hub, or in the local cache when there is no connection. Got nobody/nothing: LocalEntryNotFound" in said
    )


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers still passes it
def test_a_hub_id_in_the_local_cache(saved, tmp_path, monkeypatch):
    """As the hub's own library lays it out."""
    home = tmp_path / "models--somebody--video"
    shutil.copytree(saved, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    findings = examine("somebody/video", "cpu")
    assert len(findings) == 12
    assert all(finding.passed for finding in findings), findings
