"""Captioning: every distinct image once, by a real (small, random) BLIP, and a file that survives a killed run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from blips import write_random_blip
from conftest import ImageTree, structured_image
from PIL import Image
from settings import DataParams
from test_cli import one_sentence, run
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor, CLIPConfig

from dgs.data.captioning import MAX_TOKENS, Blip, Coverage, caption_folder, check_own, is_torn, load_blip, open_log
from dgs.data.captions import read_captions
from dgs.data.manifest import build_manifest
from dgs.data.tree import ignored_files, scan_root
from dgs.errors import UserError

SHAS = [character * 64 for character in "abcdef"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make a model this small many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_blip(tmp_path_factory.mktemp("blip") / "blip")


@pytest.fixture(scope="module")
def blip(blip_folder: Path) -> Blip:
    return load_blip(str(blip_folder), "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven different images, in a folder and one below it."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for number in range(7):
        structured_image(number).save(root / ("more" if number > 4 else ".") / f"{number}.png")
    return root


@pytest.fixture
def told() -> list[str]:
    """What the user was told."""
    return []


@pytest.fixture
def caption(photos: Path, blip: Blip, told: list[str], tmp_path: Path) -> Callable[..., Coverage]:
    """caption(load=..., out="c.jsonl", ...) captions the photos into a file beside them."""

    def go(load: Callable[[], Blip] = lambda: blip, out: str = "c.jsonl", **options: int) -> Coverage:
        return caption_folder(photos, tmp_path / out, load, told.append, **options)

    return go


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.jsonl"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def no_model() -> Blip:
    raise AssertionError("a model was loaded where there was nothing to caption")


Go = Callable[..., Coverage]


class TestCaptions:
    def test_each_image_gets_what_the_model_says_of_it_alone(
        self, photos: Path, caption: Go, blip_folder: Path, file: Path
    ) -> None:
        coverage = caption(batch_size=3)
        assert coverage == Coverage(images=7, distinct=7, captioned=7, unreadable=0, missing=0)
        assert coverage.complete
        model = BlipForConditionalGeneration.from_pretrained(blip_folder).eval()
        processor = BlipProcessor.from_pretrained(blip_folder)
        expected = {}
        for path in photos.rglob("*.png"):
            inputs = processor(images=Image.open(path), return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS)
            expected[sha(path)] = processor.decode(tokens[0], skip_special_tokens=True)
        assert read_captions(file) == expected
        assert len(set(expected.values())) == 7, "images that all get one caption would show nothing"
        for size in (1, 50):
            caption(out=f"{size}.jsonl", batch_size=size)
            assert file.with_name(f"{size}.jsonl").read_bytes() == file.read_bytes()

    def test_copies_are_captioned_once_and_all_count_as_captioned(self, photos: Path, caption: Go, file: Path) -> None:
        shutil.copy(photos / "0.png", photos / "more" / "copy.png")
        assert caption() == Coverage(images=8, distinct=7, captioned=8, unreadable=0, missing=0)
        assert len(lines(file)) == 7

    def test_each_unreadable_image_is_one_line_and_stops_nothing(
        self, photos: Path, caption: Go, told: list[str]
    ) -> None:
        (photos / "0.jpg").write_bytes(b"no image")
        (photos / "copy.jpg").write_bytes(b"no image")
        (photos / "empty.png").touch()
        (photos / "half.png").write_bytes((photos / "1.png").read_bytes()[:800])
        (photos / "gone.png").symlink_to(photos / "nowhere.png")
        coverage = caption()
        assert coverage == Coverage(images=12, distinct=7, captioned=7, unreadable=5, missing=0)
        assert not coverage.complete
        assert len(told) == 5 and not any("\n" in line for line in told)
        for name in ("0.jpg", "copy.jpg", "empty.png", "half.png", "gone.png"):
            assert sum(f"{name}:" in line for line in told) == 1, told

    def test_images_of_a_few_pixels_have_captions_too(self, tmp_path: Path, blip: Blip, file: Path) -> None:
        (tmp_path / "small").mkdir()
        shapes = [(1, 1), (3, 3), (1, 3), (3, 50), (200, 1)]
        for shape in shapes:
            Image.new("RGB", shape, "red").save(tmp_path / "small" / f"{shape}.png")
        assert caption_folder(tmp_path / "small", file, lambda: blip).captioned == len(shapes)

    def test_an_image_without_words_is_missing_and_gets_no_line(
        self, caption: Go, blip_folder: Path, file: Path, told: list[str]
    ) -> None:
        speechless = load_blip(str(blip_folder), "cpu")
        predictions = speechless.model.text_decoder.cls.predictions
        with torch.no_grad():
            predictions.bias[speechless.processor.tokenizer.sep_token_id] = 1e4  # it ends every sentence at once
        assert caption(lambda: speechless) == Coverage(images=7, distinct=7, captioned=0, unreadable=0, missing=7)
        assert sum("no words for" in line for line in told) == 7
        assert not file.exists()


class TestFolder:
    def test_the_default_file_lies_in_the_folder_and_the_pipeline_takes_both(
        self, image_tree: ImageTree, blip_folder: Path, told: list[str]
    ) -> None:
        root = image_tree()
        structured_image(99).save(root / "contact-sheet.png")  # in no label folder: the pipeline does not see it
        params = DataParams(layout="folders", root=str(root), rho=None)
        before = build_manifest(root, params)
        result = run("caption", root, "--model", blip_folder, "--device", "cpu", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["images"] == len(before)
        after = build_manifest(root, params, root / "captions.jsonl")
        assert list(after["id"]) == list(before["id"])
        assert set(after["caption_source"]) == {"file"}
        assert ignored_files(scan_root(root)) == {}


class TestGoingOn:
    def test_a_second_run_needs_no_model_and_new_images_are_added_below(
        self, photos: Path, caption: Go, file: Path
    ) -> None:
        first = caption()
        content = file.read_bytes()
        assert caption(no_model) == first
        assert file.read_bytes() == content
        (photos / "0.png").rename(photos / "more" / "renamed.png")
        assert caption(no_model).complete, "a moved image keeps its caption"
        structured_image(50).save(photos / "0-first-by-name.png")
        caption()
        assert file.read_bytes().startswith(content) and len(lines(file)) == 8

    def test_what_the_user_captioned_by_path_is_left_to_the_user(self, photos: Path, caption: Go, file: Path) -> None:
        own = json.dumps({"path": "more/6.png", "caption": "a hill"})
        file.write_text(own)  # without a newline at its end
        assert caption().complete
        assert lines(file)[0] == own and len(lines(file)) == 7
        assert sha(photos / "more/6.png") not in read_captions(file)

    def test_wherever_a_run_broke_off_the_next_one_ends_with_the_same_lines(self, caption: Go, file: Path) -> None:
        caption(batch_size=2)
        content, whole = file.read_bytes(), sorted(lines(file))
        for lost in (1, 2, 80, 200):
            file.write_bytes(content[:-lost])
            assert caption(batch_size=2).complete
            assert sorted(lines(file)) == whole

    @pytest.mark.slow
    def test_a_killed_process_leaves_a_file_that_the_same_command_completes(
        self, tmp_path: Path, file: Path, blip_folder: Path
    ) -> None:
        root = tmp_path / "photos"
        root.mkdir()
        for number in range(60):
            structured_image(number).save(root / f"{number:02d}.png")

        def command(out: str) -> list[str]:
            words = ["caption", root, "--out", tmp_path / out, "--model", blip_folder, "--batch-size", 2]
            return [sys.executable, "-m", "dgs.cli", *map(str, words), "--device", "cpu"]

        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command("undisturbed.jsonl"), env=env, check=True, capture_output=True)
        found: list[int] = []
        for more in (2, 20):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(command(file.name), env=env, **quiet)
            patience = time.monotonic() + 120
            enough = (found[-1] if found else 0) + more
            while not (file.exists() and len(lines(file)) >= enough):
                assert process.poll() is None, "it ended before it was killed: use more images"
                assert time.monotonic() < patience
                time.sleep(0.005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            found.append(len(lines(file)))
            read_captions(file)  # a batch is one write, so that most kills leave whole lines
        assert 2 <= found[0] < found[1] < 60
        with file.open("ab") as torn:
            torn.write(b'{"sha256": "9f86d081884c7d65')
        result = subprocess.run(command(file.name), env=env, check=True, capture_output=True, text=True)
        assert "cut off a torn last line of 28 bytes" in result.stderr
        assert "60 captioned" in result.stdout
        assert len(lines(file)) == 60
        assert set(lines(file)) == set(lines(tmp_path / "undisturbed.jsonl"))


class TestLog:
    @pytest.fixture
    def file(self, tmp_path: Path, told: list[str]) -> Path:
        captions = {SHAS[0]: "a dog", SHAS[1]: 'ein "Schloß"\nam See', SHAS[2]: "{"}
        with open_log(tmp_path / "c.jsonl", told.append) as log:
            for number, (sha256, caption) in enumerate(captions.items(), 1):
                log.append({sha256: caption})
                assert len(read_captions(tmp_path / "c.jsonl")) == number, "it can be read as soon as it was added"
        assert read_captions(tmp_path / "c.jsonl") == log.captions == captions
        return tmp_path / "c.jsonl"

    def test_cut_at_any_byte_it_keeps_every_whole_line_and_no_other(self, file: Path, told: list[str]) -> None:
        content = file.read_bytes()
        for length in range(1, len(content)):
            file.write_bytes(content[:length])
            whole = content[:length].count(b"\n") + (content[length : length + 1] == b"\n")
            told.clear()
            with open_log(file, told.append) as log:
                assert list(log.captions) == SHAS[:whole], length
                log.append({SHAS[5]: "a cat"})
            assert list(read_captions(file)) == [*SHAS[:whole], SHAS[5]]
            at_the_end_of_a_line = content[length - 1 : length] == b"\n" or content[length : length + 1] == b"\n"
            assert len(told) == (0 if at_the_end_of_a_line else 1), length

    @pytest.mark.parametrize("tail", [b"\0" * 500, b'{"sha' + b"\0" * 500])
    def test_zeros_that_a_crashed_machine_left_are_cut_off(self, file: Path, told: list[str], tail: bytes) -> None:
        content = file.read_bytes()
        file.write_bytes(content + tail)
        with open_log(file, told.append) as log:
            assert list(log.captions) == SHAS[:3]
        assert file.read_bytes() == content
        assert len(told) == 1 and f"{len(tail)} bytes" in told[0]

    @pytest.mark.parametrize("content", ["some notes", "# Title\n\nsome notes", '{"path": "a.jpg", "capt', '["a"]'])
    def test_a_file_of_another_kind_is_refused_and_no_line_of_it_lost(
        self, tmp_path: Path, told: list[str], content: str
    ) -> None:
        file = tmp_path / "notes.md"
        file.write_text(content)
        with pytest.raises(UserError, match=r"notes\.md, line 1"), open_log(file, told.append):
            pass
        assert file.read_text().rstrip("\n") == content

    def test_only_a_broken_line_of_ours_is_torn(self) -> None:
        assert is_torn(b'{"sha256": "ab') and is_torn(b"{") and is_torn(b"\0")
        assert not is_torn(b"") and not is_torn(b'{"sha256": "ab", "caption": "x"}') and not is_torn(b'{"sha1": "ab')

    def test_a_second_process_is_refused_while_one_writes(self, file: Path, told: list[str]) -> None:
        refused = pytest.raises(UserError, match="another one writing")
        with open_log(file, told.append), refused, open_log(file, told.append):
            pass
        with open_log(file, told.append) as log:
            assert len(log.captions) == 3

    def test_a_full_disk_is_one_sentence_and_no_line_is_lost(self, file: Path, told: list[str]) -> None:
        content = file.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with open_log(file, told.append) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 30, hard))  # takes 30 bytes more, then none
            try:
                with pytest.raises(UserError, match="goes on where it stopped") as error:
                    log.append({SHAS[3]: "a cat"})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert len(file.read_bytes()) == len(content) + 30
        with open_log(file, told.append) as log:
            assert list(log.captions) == SHAS[:3]
            log.append({SHAS[3]: "a cat"})
        assert list(read_captions(file)) == SHAS[:4]

    def test_nothing_added_leaves_no_file(self, tmp_path: Path, told: list[str]) -> None:
        with open_log(tmp_path / "c.jsonl", told.append):
            pass
        assert not (tmp_path / "c.jsonl").exists()

    @pytest.mark.parametrize("out", [".", "/dev/full", "/proc/none/c.jsonl"])
    def test_what_cannot_be_a_caption_file_is_one_sentence(self, tmp_path: Path, told: list[str], out: str) -> None:
        with pytest.raises(UserError, match="Give another --out FILE") as error, open_log(tmp_path / out, told.append):
            pass
        assert "\n" not in str(error.value)


class TestOwnFile:
    @pytest.fixture
    def own(self, tmp_path: Path, photos: Path) -> Callable[..., Path]:
        def write(*keys: tuple[str, str]) -> Path:
            file = tmp_path / "own.jsonl"
            file.write_text("".join(json.dumps({kind: key, "caption": "a dog"}) + "\n" for kind, key in keys))
            return file

        return write

    def test_it_may_name_images_by_path_or_for_copies_too_by_hash(self, photos: Path, own: Callable[..., Path]) -> None:
        file = own(("path", "0.png"), ("path", r"more\5.png"), ("sha256", sha(photos / "1.png")))
        assert check_own(photos, file) == Coverage(images=7, distinct=7, captioned=3, unreadable=0, missing=4)
        shutil.copy(photos / "0.png", photos / "copy.png")
        assert check_own(photos, own(("path", "0.png"))).captioned == 1
        assert check_own(photos, own(("sha256", sha(photos / "0.png")))).captioned == 2

    def test_a_caption_does_not_make_an_image_readable(
        self, photos: Path, own: Callable[..., Path], told: list[str]
    ) -> None:
        (photos / "bad.png").write_bytes(b"no image")
        coverage = check_own(photos, own(("path", "bad.png"), ("path", "0.png")), told.append)
        assert coverage == Coverage(images=8, distinct=7, captioned=1, unreadable=1, missing=6)
        assert len(told) == 1 and "bad.png" in told[0]

    def test_strangers_are_named_and_nothing_is_written(self, photos: Path, own: Callable[..., Path]) -> None:
        names = sorted(path.name for path in photos.rglob("*.png"))
        file = own(*(("path", f"more/{name}" if name > "5" else name) for name in names), ("path", "more/6.pgn"))
        content = file.read_bytes()
        result = run("caption", photos, "--captions", file)
        assert result.exit_code == 1
        assert "No image for the caption of 'more/6.pgn'. Did you mean 'more/6.png'?" in result.stderr
        assert "7 captioned, 0 unreadable, 0 missing" in result.stdout
        assert file.read_bytes() == content and not (photos / "captions.jsonl").exists()

    def test_of_very_many_strangers_some_are_named_and_all_counted(
        self, photos: Path, own: Callable[..., Path]
    ) -> None:
        file = own(*(("path", f"elsewhere/{number}.png") for number in range(500)))
        result = run("caption", photos, "--captions", file, "--json")
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 12 and "And none for 490 more." in result.stderr
        assert len(json.loads(result.stdout)["strangers"]) == 500

    def test_a_file_that_covers_all_exits_with_0(self, photos: Path, own: Callable[..., Path]) -> None:
        result = run("caption", photos, "--captions", own(*(("sha256", sha(path)) for path in photos.rglob("*.png"))))
        assert (result.exit_code, result.stderr) == (0, "")


class TestModel:
    def test_without_transformers_the_sentence_says_how_to_install_it(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)  # what an import finds where it is not installed
        message = one_sentence(run("caption", photos))
        assert "pip install -e '.[captions]'" in message and "--captions FILE" in message

    def test_the_install_command_names_an_extra_that_there_is(self) -> None:
        assert re.search(
            r"^captions = \[.*transformers", (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.MULTILINE
        )

    def test_without_network_and_weights_the_sentence_says_how_to_get_them(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = one_sentence(run("caption", photos, "--model", "nobody/no-such-blip"))
        assert "hf download nobody/no-such-blip." in message
        assert "--local-dir FOLDER" in message and "--model FOLDER" in message and "--captions FILE" in message
        assert not (photos / "captions.jsonl").exists()

    @pytest.mark.parametrize(
        ("damage", "facts"),
        [
            ("another kind", ("found a model of type clip", "Salesforce/blip-image-captioning-base")),
            ("no decoder", ("found none for text_decoder.bert.encoder", "others")),  # and no noise in its place
            ("model.safetensors", ("/damaged", "Restore it, or give another --model.")),
            ("config.json", ("/damaged", "Restore it, or give another --model.")),
            ("empty", ("/damaged", "Restore it, or give another --model.")),
        ],
    )
    def test_a_folder_without_a_captioning_blip_is_one_sentence(
        self, photos: Path, tmp_path: Path, blip_folder: Path, damage: str, facts: tuple[str, ...]
    ) -> None:
        folder = tmp_path / "damaged"
        folder.mkdir()
        if damage == "another kind":
            CLIPConfig().save_pretrained(folder)
        elif damage != "empty":
            shutil.copytree(blip_folder, folder, dirs_exist_ok=True)
        if damage == "no decoder":
            BlipForImageTextRetrieval(BlipConfig.from_pretrained(blip_folder)).save_pretrained(folder)
        if (folder / damage).is_file():
            (folder / damage).write_bytes((folder / damage).read_bytes()[:200])
        message = one_sentence(run("caption", photos, "--model", folder))
        assert not [fact for fact in facts if fact not in message], message


class TestCommand:
    @pytest.fixture
    def caption(self, photos: Path, blip_folder: Path) -> Iterator[Callable[..., object]]:
        yield lambda *arguments: run("caption", photos, "--model", blip_folder, "--device", "cpu", *arguments)

    def test_all_captioned_exits_with_0_and_says_so_on_stdout(
        self, caption: Callable[..., object], photos: Path
    ) -> None:
        result = caption()
        assert result.exit_code == 0, result.output
        file = photos / "captions.jsonl"
        assert result.stdout == f"{file}: 7 images, 7 distinct; 7 captioned, 0 unreadable, 0 missing\n"
        assert len(read_captions(file)) == 7
        counts = {"images": 7, "distinct": 7, "captioned": 7, "unreadable": 0, "missing": 0, "strangers": []}
        assert json.loads(caption("--json").stdout) == {"file": str(file), **counts}

    def test_an_image_that_cannot_be_read_or_was_removed_since_exits_with_1(
        self, caption: Callable[..., object], photos: Path
    ) -> None:
        (photos / "bad.png").write_bytes(b"no image")
        result = caption()
        assert result.exit_code == 1
        assert "7 captioned, 1 unreadable" in result.stdout and "bad.png" in result.stderr
        (photos / "bad.png").unlink()
        gone = sha(photos / "0.png")
        (photos / "0.png").unlink()
        result = caption()  # the pipeline would refuse its caption
        assert result.exit_code == 1 and f"No image for the caption of '{gone}'" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "fact"),
        [
            (["--device", "nonesuch"], "--device = 'nonesuch'"),
            (["--captions", "nowhere.jsonl"], "Expected a caption file at nowhere.jsonl"),
            (["--captions", "."], "Expected a caption file at ."),
            (["--captions", "a.jsonl", "--out", "b.jsonl"], "Expected --captions or --out, found both"),
            (["--out", "."], "Give another --out FILE"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, photos: Path, arguments: list[str], fact: str) -> None:
        assert fact in one_sentence(run("caption", photos, *arguments))

    def test_a_folder_that_is_none_or_has_no_images_is_one_sentence(self, tmp_path: Path) -> None:
        assert "Expected a folder of images" in one_sentence(run("caption", tmp_path / "none"))
        assert "Expected image files" in one_sentence(run("caption", tmp_path))
        (tmp_path / "a.txt").touch()
        assert "Expected image files" in one_sentence(run("caption", tmp_path))

    @pytest.mark.parametrize("arguments", [[], ["--batch-size", "0"], ["--batch-size", "many"], ["--modle", "x"]])
    def test_wrong_usage_exits_with_2(self, photos: Path, arguments: list[str]) -> None:
        result = run("caption", *([photos] if arguments else []), *arguments)
        assert result.exit_code == 2
        assert result.stdout == "" and result.stderr and "Traceback" not in result.stderr

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_without_permission_is_one_sentence(self, photos: Path, tmp_path: Path) -> None:
        file = tmp_path / "own.jsonl"
        file.touch(mode=0o000)
        assert "Permission denied" in one_sentence(run("caption", photos, "--captions", file))
        assert "Permission denied" in one_sentence(run("caption", photos, "--out", file))
