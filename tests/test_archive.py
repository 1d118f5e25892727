"""OpenAI's own files: tensors and code in one archive, of which the tensors alone are read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clips import CONFIG
from settings import ModelParams
from torch import Tensor, nn
from typer.testing import CliRunner

from dgs.cli import app
from dgs.errors import UserError
from dgs.model.archive import convert_archive, read_archive
from dgs.model.clip import load_clip
from dgs.model.clip_source import find_clip

SMALL = {**CONFIG, "quick_gelu": True, "text_cfg": {**CONFIG["text_cfg"], "width": 64, "heads": 1}}
SMALL["vision_cfg"] = {**CONFIG["vision_cfg"], "width": 64, "head_width": 64}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(**SMALL).eval()


@pytest.fixture(scope="module")
def archive(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of OpenAI's architecture as they saved theirs: traced, in half precision where weights are matrices."""
    halved = open_clip.CLIP(**SMALL)
    halved.load_state_dict(model.state_dict())
    halved.register_buffer("input_resolution", torch.tensor(32))
    inputs = {"encode_image": torch.rand(1, 3, 32, 32), "encode_text": torch.ones(1, 16, dtype=torch.long)}
    path = tmp_path_factory.mktemp("archive") / "ViT-tiny.pt"
    torch.jit.trace_module(halved.eval(), inputs, check_trace=False).half().save(str(path))
    return path


def test_is_read_as_what_the_model_held(archive: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TorchScript archive.* dgs tower --archive ViT-tiny\.pt --out DIR"):
        find_clip(ModelParams(clip="ViT-B-32", pretrained=archive.name), archive.parent)
    result = CliRunner().invoke(app, ["tower", "--archive", str(archive), "--out", str(tmp_path / "clip")])
    assert result.exit_code == 0, result.output
    clip = load_clip(ModelParams(clip="clip"), tmp_path, 32, text=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = model.visual(images), clip.model.visual(images)
    assert torch.allclose(found, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))  # halves
    read = clip.model.state_dict()
    for name, value in model.state_dict().items():
        assert name not in read or torch.equal(read[name], value.half().float()), name
    assert len(set(read) - set(model.state_dict())) == 2 * 3 * 2  # q, k and v of two blocks, apart
    assert clip.features["visual.transformer.resblocks.mlp.gelu"] == "QuickGELU"


class Block(nn.Module):
    """Holds what scripted modules hold beside tensors, and views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(6, 4)
        self.a, self.b, self.turned = nn.Parameter(whole[:3]), nn.Parameter(whole[3:]), nn.Parameter(whole.t())
        self.none, self.one = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.tensor(2.5))
        self.register_buffer("mask", torch.ones(4).bool())
        self.sizes, self.rates, self.words = [1, 70_000], [0.5], {"a": 1}
        self.device = torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.t()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["traced", "scripted"])
def test_every_tensor_of_an_archive_is_read(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(Block(), nn.ReLU()).to(dtype).eval()
    made = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, torch.rand(2, 4, dtype=dtype))
    made.save(str(tmp_path / "x.pt"))
    found, expected = read_archive(tmp_path / "x.pt"), made.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {value.dtype for value in found.values()} == {dtype, torch.bool}


def rewritten(archive: Path, target: Path, content: Callable[[bytes], bytes]) -> Path:
    """A copy with another data.pkl."""
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            data = before.read(entry)
            after.writestr(entry.filename, content(data) if entry.filename.endswith("/data.pkl") else data)
    return target


STORED = b"(S'storage'\nctorch\nHalfStorage\nS'0'\nS'cpu'\nI%d\ntQ"


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize(
    "content",
    [
        lambda data: pickle.dumps(_Harm()),
        lambda data: b'cbuiltins\neval\n(S\'open("harmed","w")\'\ntR.',
        lambda data: b"ctorch._utils\n_rebuild_parameter\n(tR.",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"HalfStorage", b"LongStorage"),
        lambda data: b"",
    ],
    ids=["a function", "a builtin", "another of torch's", "cut short", "another size than its storages", "nothing"],
)
def test_with_anything_else_in_it_is_one_sentence_and_runs_nothing(
    content: Callable[[bytes], bytes], archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="as a TorchScript archive of tensors alone") as caught:
        read_archive(rewritten(archive, tmp_path / "x.pt", content))
    assert "\n" not in str(caught.value) and not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n(%sI0\n(I1000000000000000\nt(I0\nttR", "larger than its storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(%sI0\n(I%n\nt(I1\nttR" * 20_000, "larger than the file"),
    ],
    ids=["by strides", "by one storage many times"],
)
def test_whose_tensors_would_fill_the_memory_is_one_sentence(
    tensors: bytes, sentence: str, archive: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as opened:
        count = next(entry.file_size for entry in opened.infolist() if entry.filename.endswith("/data/0")) // 2
    content = tensors.replace(b"%s", STORED % count).replace(b"%n", b"%d" % count) + b"."
    with pytest.raises(UserError, match=sentence):
        read_archive(rewritten(archive, tmp_path / "x.pt", lambda data: content))


def test_of_another_architecture_or_no_archive_is_one_sentence(tmp_path: Path, archive: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(UserError, match="as in a vision transformer of OpenAI's, found"):
        convert_archive(tmp_path / "linear.pt", tmp_path / "a")
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"it holds no module: tensors alone are for model\.pretrained as they are"):
        convert_archive(tmp_path / "w.pt", tmp_path / "a")
    (tmp_path / "text.pt").write_text("no zip")
    for name, sentence in {"text.pt": "Cannot read", "none.pt": "found none"}.items():
        with pytest.raises(UserError, match=sentence):
            convert_archive(tmp_path / name, tmp_path / "a")
    with pytest.raises(UserError, match="Expected --out to name a new folder"):
        convert_archive(archive, tmp_path)
    assert not (tmp_path / "a").exists()
