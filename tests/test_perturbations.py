"""Conditions by name, and what each does to an image."""

from __future__ import annotations

import hashlib
import io
import re

import numpy as np
import pytest
from conftest import ImageTree, structured_image
from PIL import Image
from settings import DataParams, validate

from dgs.conditions import KINDS, Condition, parse_condition
from dgs.data.checks import jpeg_quality
from dgs.data.manifest import ImageSource, build_manifest, open_image
from dgs.data.patches import patch_indices
from dgs.data.perturbations import blur, noise, perturb, resize, scale
from dgs.data.views import EVALUATION, Views, make_view

ALL = (
    "jpeg:95 jpeg:90 jpeg:75 jpeg:50 jpeg:30 blur:1 blur:2 blur:4 resize:0.5 resize:0.75 resize:1.5 noise:2 noise:8 "
    "crop:0.9 crop:0.5 png"
)
EVERY = pytest.mark.parametrize("name", ALL.split())
PICTURE = np.asarray(structured_image(1, 48, 40))
GREY = np.full((128, 128, 3), 128, np.uint8)
SHA = hashlib.sha256(b"an image").hexdigest()


class TestNames:
    @EVERY
    def test_a_condition_comes_back_from_its_name(self, name: str) -> None:
        assert parse_condition(name).name == name

    def test_one_condition_has_one_name(self) -> None:
        assert parse_condition(" blur:1.0").name == "blur:1"
        assert parse_condition("jpeg:75.0") == Condition("jpeg", 75)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("jpg:75", "Did you mean 'jpeg'? Expected such as jpeg:75, blur:1, resize:0.5, noise:4, "),
            ("native", "leave 'native' out, it is always scored"),
            ("jpeg", "expected a quality after 'jpeg:', a whole number from 1 to 100, such as jpeg:75"),
            ("jpeg:0", "a whole number from 1 to 100"),
            ("jpeg:75.5", "a whole number from 1 to 100"),
            ("jpeg:101", "a whole number from 1 to 100"),
            ("blur:0", "expected a standard deviation in px after 'blur:', above 0"),
            ("noise:nan", "expected a standard deviation in 8-bit levels after 'noise:'"),
            ("resize:1", "and not 1, such as resize:0.5"),
            ("resize:-2", "expected a factor after 'resize:'"),
            ("crop:1", "expected a share of the sides after 'crop:', above 0, at most 1 and not 1, such as crop:0.9"),
            ("png:9", "'png' has no strength"),
        ],
    )
    def test_a_wrong_one_is_told_what_is_expected(self, text: str, sentence: str) -> None:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            parse_condition(text)

    def test_severity_orders_each_kind_from_mild_to_harsh(self) -> None:
        names = ALL.split()
        for kind, order in {"jpeg": "95 90 75 50 30", "blur": "1 2 4", "resize": "1.5 0.75 0.5"}.items():
            own = [parse_condition(name) for name in names if name.startswith(kind)]
            assert [f"{c.strength:g}" for c in sorted(own, key=lambda c: c.severity)] == order.split()
        assert parse_condition("resize:1.5").severity < 0 < parse_condition("jpeg:100").severity


class TestEach:
    @EVERY
    def test_keeps_size_and_type_and_leaves_its_input_alone(self, name: str) -> None:
        before = PICTURE.copy()
        changed = perturb(PICTURE, parse_condition(name), SHA)
        assert (changed.shape, changed.dtype) == (PICTURE.shape, np.uint8)
        assert np.array_equal(PICTURE, before)
        assert np.array_equal(changed, PICTURE) == (name == "png"), "only PNG changes nothing"

    @EVERY
    def test_is_fixed_by_image_hash_and_condition_whatever_ran_before(self, name: str) -> None:
        first = perturb(PICTURE, parse_condition(name), SHA)
        np.random.seed(3)
        perturb(PICTURE, Condition("noise", 5), SHA)
        assert np.array_equal(perturb(PICTURE, parse_condition(name), SHA), first)

    @pytest.mark.parametrize("kind", KINDS)
    def test_harsher_is_further_from_the_image(self, kind: str) -> None:
        own = sorted((parse_condition(n) for n in ALL.split() if n.startswith(kind)), key=lambda c: c.severity)
        errors = [np.abs(perturb(PICTURE, c, SHA).astype(float) - PICTURE).mean() for c in own if c.severity > 0]
        assert errors == sorted(errors) and errors[0] < errors[-1]

    @pytest.mark.parametrize("quality", [95, 90, 75, 50, 30])
    def test_jpeg_has_its_quality_by_the_files_own_tables(self, quality: int) -> None:
        stored = io.BytesIO()
        Image.fromarray(PICTURE).save(stored, "JPEG", quality=quality, subsampling="4:2:0")
        with Image.open(stored) as file:
            assert jpeg_quality(file.quantization[0]) == quality  # type: ignore[attr-defined]
            assert np.array_equal(perturb(PICTURE, Condition("jpeg", quality), SHA), np.array(file))

    @pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
    def test_blur_spreads_a_point_by_its_sigma(self, sigma: float) -> None:
        # A bright line keeps enough light for 8 bits; across it the profile is the kernel's own.
        line = np.zeros((65, 65, 3), np.uint8)
        line[:, 32] = 255
        profile = blur(line, sigma)[32, :, 0].astype(float)
        at = np.arange(65) - 32
        assert (profile * at).sum() == pytest.approx(0.0, abs=1e-9)
        assert (profile * at**2).sum() / profile.sum() == pytest.approx(sigma**2, rel=0.05)

    def test_a_crop_shows_the_middle_at_the_whole_size(self) -> None:
        framed = np.full((100, 60, 3), 9, np.uint8)
        framed[10:90, 6:54] = 200
        assert (perturb(framed, Condition("crop", 0.8), SHA) == 200).all()
        assert (perturb(framed, Condition("crop", 0.9), SHA)[0] != 200).all()

    def test_blur_leaves_a_plain_image_plain(self) -> None:
        assert np.array_equal(blur(GREY, 4.0), GREY)

    @pytest.mark.parametrize(("factor", "size"), [(0.5, (20, 24)), (0.75, (30, 36)), (1.5, (60, 72)), (0.001, (1, 1))])
    def test_resize_goes_through_the_scaled_size_and_back(self, factor: float, size: tuple[int, int]) -> None:
        assert scale(PICTURE, factor).shape == (*size, 3)
        assert resize(PICTURE, factor).shape == PICTURE.shape

    def test_resize_takes_what_the_smaller_image_cannot_hold_and_enlarging_takes_next_to_nothing(self) -> None:
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 255  # the finest there are
        assert resize(stripes, 0.5).std() < 0.1 * stripes.std()
        error = np.abs(resize(PICTURE, 1.5).astype(float) - PICTURE).mean()
        assert error < 0.5 * np.abs(resize(PICTURE, 0.75).astype(float) - PICTURE).mean()

    @pytest.mark.parametrize("sigma", [2.0, 4.0, 8.0])
    def test_noise_has_its_sigma_and_no_bias(self, sigma: float) -> None:
        grain = noise(GREY, sigma, np.random.default_rng(0)).astype(float) - 128
        assert grain.std() == pytest.approx(np.sqrt(sigma**2 + 1 / 12), rel=0.02)  # 1/12: rounding to whole levels
        assert abs(grain.mean()) < 4 * sigma / np.sqrt(grain.size)
        colours = np.corrcoef(grain.reshape(-1, 3).T)
        assert np.abs(colours[~np.eye(3, dtype=bool)]).max() < 0.03, "each colour has noise of its own"

    def test_noise_differs_between_images_and_conditions(self) -> None:
        other = hashlib.sha256(b"another image").hexdigest()
        noises = [perturb(GREY, Condition("noise", s), sha).astype(int) - 128 for s in (4, 8) for sha in (SHA, other)]
        flat = np.corrcoef([grain.ravel() for grain in noises])
        assert np.abs(flat[~np.eye(4, dtype=bool)]).max() < 0.05

    def test_noise_is_cut_at_black_and_white(self) -> None:
        assert set(np.unique(noise(np.zeros((9, 9, 3), np.uint8), 0.1, np.random.default_rng(0)))) == {0}

    def test_an_unknown_kind_is_a_bug(self) -> None:
        with pytest.raises(ValueError, match="unknown kind"):
            perturb(PICTURE, Condition("fog", 1), SHA)


class TestViews:
    """The decoded image is changed whole, before anything is cut out of it."""

    def test_the_change_comes_before_the_crop(self, image_tree: ImageTree) -> None:
        root = image_tree()
        rows = build_manifest(root, DataParams(layout="folders", root=str(root), rho=None)).head(4)
        params, condition = validate({"model": {"image_size": 16}}), Condition("blur", 4)
        views = Views(rows, ImageSource(root), params, condition=condition)
        for index, row in enumerate(rows.itertuples()):
            image = open_image(ImageSource(root), row.file, row.row)
            expected = make_view(perturb(image, condition, row.sha256), row.sha256, params, 0, EVALUATION)
            cropped_first = perturb(make_view(image, row.sha256, params, 0, EVALUATION), condition, row.sha256)
            found = views[index][0].permute(1, 2, 0).numpy()
            assert np.array_equal(found, expected) and not np.array_equal(found, cropped_first)

    def test_patches_are_selected_by_the_changed_image(self, image_tree: ImageTree) -> None:
        root = image_tree()
        rows = build_manifest(root, DataParams(layout="folders", root=str(root), rho=None)).head(6)
        params, condition = validate({"patches": {"enabled": True, "size": 8, "count": 4}}), Condition("noise", 40)
        native = {
            row.sha256: patch_indices(open_image(ImageSource(root), row.file, row.row), 8, 4)
            for row in rows.itertuples()
        }
        views, moved = Views(rows, ImageSource(root), params, patches=native, condition=condition), False
        for index, row in enumerate(rows.itertuples()):
            changed = perturb(open_image(ImageSource(root), row.file, row.row), condition, row.sha256)
            own = patch_indices(changed, 8, 4)
            expected = make_view(changed, row.sha256, params, 0, EVALUATION, own)
            assert np.array_equal(views[index][0].permute(1, 2, 0).numpy(), expected)
            moved |= set(own) != set(native[row.sha256])
        assert moved, "or the test could not tell"
