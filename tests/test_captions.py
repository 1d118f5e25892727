"""Captions: what a file may hold, and what an image gets that it does not name."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.data.captions import assign_captions, by_image, read_captions, template_caption
from dgs.errors import UserError

SHA = "ab" * 32
IMAGES = pd.DataFrame({"file": ["a.jpg", "b.jpg", "c.jpg"], "sha256": ["s1", "s2", "s1"]})


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "captions.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as error:
        read_captions(file)
    message = str(error.value)
    assert file.name in message and "\n" not in message
    return message


class TestReading:
    def test_a_folder_is_no_caption_file(self, tmp_path: Path) -> None:
        assert "Expected a caption file at" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            (  # by path, by hash, and with blank lines
                [{"path": "train/x/0_real/a.jpg", "caption": " a red car "}, "", {"sha256": SHA, "caption": "Schloß"}],
                {"train/x/0_real/a.jpg": "a red car", SHA: "Schloß"},
            ),
            ([{"path": r"train\x\0_real\a.jpg", "caption": "a"}], {"train/x/0_real/a.jpg": "a"}),  # Windows separators
            ([{"path": "a.jpg", "caption": "a"}] * 2, {"a.jpg": "a"}),  # the same caption twice is no conflict
            ([{"path": "a.jpg", "caption": "a boat\u2028on"}], {"a.jpg": "a boat\u2028on"}),  # JSON allows it bare
        ],
    )
    def test_what_a_file_may_hold(self, tmp_path: Path, lines: list[Any], expected: dict[str, str]) -> None:
        assert read_captions(write(tmp_path, *lines)) == expected

    @given(caption=st.text(min_size=1).filter(lambda text: text.strip()))
    @settings(max_examples=40, deadline=None)
    def test_any_text_may_be_a_caption(self, tmp_path_factory: pytest.TempPathFactory, caption: str) -> None:
        folder = tmp_path_factory.mktemp("captions")
        assert read_captions(write(folder, {"path": "a.jpg", "caption": caption})) == {"a.jpg": caption.strip()}

    def test_a_missing_file_says_which_parameter_to_set(self, tmp_path: Path) -> None:
        message = refusal(tmp_path / "captions.jsonl")
        assert str(tmp_path) in message and "data.captions" in message

    @pytest.mark.parametrize(
        ("line", "facts"),
        [
            ("{'path': 'b.jpg'}", ["not JSON", "one object a line"]),
            ('["b.jpg", "a cat"]', ["expected an object", "list"]),
            ({"path": "b.jpg", "captoin": "a cat"}, ["'captoin'", "Did you mean 'caption'?"]),
            ({"file": "b.jpg", "caption": "a cat"}, ["'file'", "path or sha256"]),
            ({"path": "b.jpg"}, ["expected a 'caption'", "found ['path']"]),
            ({"caption": "a cat"}, ["'path' or 'sha256'", "found ['caption']"]),
            ({"path": "b.jpg", "caption": "  "}, ["expected a 'caption'"]),
            ({"path": "b.jpg", "caption": 3}, ["expected a 'caption'"]),
            ({"path": 3, "caption": "a cat"}, ["'path' or 'sha256'"]),
            ("[" * 100_000, ["not JSON", "one object a line"]),
            ('{"path": "b.jpg", "caption": "\\ud800"}', ["expected a 'caption'"]),
            ({"path": "a.jpg", "caption": "another"}, ["different caption", "'a.jpg'", "Keep one"]),
        ],
    )
    def test_a_wrong_line_is_named_by_its_number(self, tmp_path: Path, line: Any, facts: list[str]) -> None:
        message = refusal(write(tmp_path, {"path": "a.jpg", "caption": "a dog"}, "", line))
        assert "line 3" in message
        assert all(fact in message for fact in facts)

    def test_another_encoding_is_a_sentence(self, tmp_path: Path) -> None:
        file = tmp_path / "captions.jsonl"
        file.write_bytes('{"path": "a.jpg", "caption": "ein Schloß"}\n'.encode("latin-1"))
        assert "UTF-8" in refusal(file)


class TestTemplate:
    @pytest.mark.parametrize(
        ("folder", "caption"),
        [
            ("horse", "a photo of horse"),
            ("progan_train", "a photo of progan"),
            ("StableDiffusion-v1.5", "a photo of stable diffusion v"),
            ("SummerHouse", "a photo of summer house"),
            ("0_real", "a photo"),
            ("FAKE", "a photo"),
            ("123", "a photo"),
        ],
    )
    def test_a_folder_name_in_words(self, folder: str, caption: str) -> None:
        assert template_caption(folder) == caption

    @given(
        st.lists(
            st.sampled_from(["Real", "fake", "1", "_", "-", "GAN", "generated", "Dog", " ", "train", "é"]), max_size=6
        )
    )
    def test_it_never_tells_the_label(self, parts: list[str]) -> None:
        caption = template_caption("_".join(parts))
        assert caption.startswith("a photo")
        assert not {"real", "fake", "generated", "gan"} & set(caption.lower().split())


class TestAssigning:
    def test_path_before_hash_before_template(self) -> None:
        given = assign_captions(IMAGES, {"a.jpg": "by path", "s1": "by hash"})
        assert given.fillna("template").tolist() == ["by path", "template", "by hash"]

    def test_without_a_file_none_has_one(self) -> None:
        assert assign_captions(IMAGES, {}).isna().all()

    def test_keys_that_name_no_image_are_an_error(self) -> None:
        with pytest.raises(UserError) as error:
            assign_captions(IMAGES, {"a.jpg": "a", "b.jpgg": "b", "zzz": "c"})
        message = str(error.value)
        assert "2 of 3 captions" in message and "'b.jpgg'" in message and "Did you mean 'b.jpg'?" in message
        assert "relative to data.root" in message and "\n" not in message

    def test_a_path_in_another_unicode_form_names_the_image_and_both_may_be_there(self) -> None:
        composed, decomposed = (unicodedata.normalize(form, "train/a/0_real/Müller.png") for form in ("NFC", "NFD"))
        for file, key in ((composed, decomposed), (decomposed, composed)):
            images = pd.DataFrame({"file": [file], "sha256": ["s"]})
            assert list(assign_captions(images, {key: "a wall"})) == ["a wall"]
        images = pd.DataFrame({"file": [composed, decomposed], "sha256": ["s", "t"]})
        assert list(assign_captions(images, {composed: "one", decomposed: "two"})) == ["one", "two"]

    @pytest.mark.parametrize("other", ["/x/train/u\u0308.jpg", "train/u\u0308.jpg", "D:/y/train/\u00fc.jpg"])
    def test_two_captions_of_one_image_are_an_error_however_it_is_named(self, other: str) -> None:
        captions = {"train/\u00fc.jpg": "one", other: "another"}
        with pytest.raises(UserError, match="Expected one caption of train/"):
            by_image(captions, ["train/\u00fc.jpg"])
        assert by_image(dict.fromkeys(captions, "one"), ["train/\u00fc.jpg"]) == {"train/\u00fc.jpg": "one"}

    def test_an_absolute_path_names_the_image_that_it_ends_in(self) -> None:
        files = ["train/x/0_real/a.jpg", "0_real/a.jpg"]
        for start in ("/home/somebody/data/", "C:/data/", "/"):
            assert by_image({f"{start}{files[0]}": "a car"}, files) == {files[0]: "a car"}
        assert by_image({f"other/{files[0]}": "a car"}, files) == {f"other/{files[0]}": "a car"}
        assert by_image({SHA: "a car"}, files) == {SHA: "a car"}


class TestOneObject:
    """The form of the authors' release: {path: caption}."""

    def test_it_is_read_like_lines(self, tmp_path: Path) -> None:
        for indent in (None, 2):
            text = json.dumps({r"train\x\a.jpg": " a red car ", "./b.jpg": "Schloß", SHA: "a cat"}, indent=indent)
            assert read_captions(write(tmp_path, text)) == {
                "train/x/a.jpg": "a red car",
                "b.jpg": "Schloß",
                SHA: "a cat",
            }

    @pytest.mark.parametrize(
        ("text", "facts"),
        [
            ('{"a.jpg": 3}', ["no text for 'a.jpg'"]),
            ('{"a.jpg": " "}', ["no text for 'a.jpg'"]),
            ('{"a.jpg": ["a cat"]}', ["no text for 'a.jpg'"]),
            ('{"a.jpg": "\\ud800"}', ["no text for 'a.jpg'"]),
            ('{"a":' * 100_000, ["not JSON"]),
            ('{"a.jpg": "a cat", "./a.jpg": "a dog"}', ["a second, different caption for './a.jpg'"]),
            ('{"a.jpg": "a cat",\n "b.jpg": "a d', ["not JSON"]),
        ],
    )
    def test_what_is_wrong_in_it_is_one_sentence(self, tmp_path: Path, text: str, facts: list[str]) -> None:
        message = refusal(write(tmp_path, text))
        assert not [fact for fact in facts if fact not in message], message
