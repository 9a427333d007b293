import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from probe import film
from probe.errors import StoreError


def clip(frames=9, height=16, width=24):
    made = np.zeros((frames, height, width, 3), np.uint8)
    made[:, 4:8, 4:12] = (200, 40, 40)
    made[:, :, 12:] = np.linspace(0, 240, frames).astype(np.uint8)[:, None, None, None]
    return made


def test_video_files_hold_the_frames(tmp_path):
    frames = clip()
    paths = film.save_video(tmp_path, frames, 8)
    assert [path.name for path in paths] == ["video.mp4", "video.gif"]
    video = iio.imread(paths[0])
    assert video.shape == (9, 256, 384, 3)  # enlarged 16 times
    assert np.abs(video.astype(int) - film.enlarge(frames)).mean() < 4
    with Image.open(paths[1]) as gif:
        assert gif.n_frames == 9
        assert gif.size == (384, 256)
        assert gif.info["duration"] == 120  # a GIF counts hundredths of a second; 125 is cut


def test_large_frames_keep_their_size():
    assert film.enlarge(clip(1, 300, 400)).shape == (1, 300, 400, 3)


def test_heat_paints_zero_and_peak():
    colours = film.heat(np.array([0.0, 0.5, 1.0]))
    assert colours[0].tolist() == [0, 34, 78]
    assert colours[2].tolist() == [254, 232, 56]
    assert film.heat(np.zeros(3)).tolist() == [[0, 34, 78]] * 3
    greys = film.heat(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(greys) > 0).all()


def test_token_frames_and_pixel_frames():
    assert film.frames_of_tokens(17, 5).tolist() == [0] + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert film.frames_of_tokens(1, 1).tolist() == [0]


def test_overlay_covers_the_token_and_leaves_zero():
    frames = clip()
    lift = np.zeros((3, 4, 6))
    lift[2, 3, 5] = 2.0
    covered = film.overlay(frames, lift)
    assert np.array_equal(covered[:5], frames[:5])
    changed = (covered != frames).any(-1)
    assert changed[5:, 12:, 20:].all()
    assert not changed[:, :12].any()


def test_contact_sheet(tmp_path):
    pictures, notes = film.pick(clip(), 3)
    assert notes == ("0", "4", "8")
    path = film.contact_sheet(tmp_path / "sheet.png", "a title", [film.Row("a row", pictures, notes)])
    with Image.open(path) as sheet:
        assert sheet.size == (2 * 20 + 3 * 192 + 2 * 6, 128 + 46 + 2 * 20 + 26)
    with pytest.raises(StoreError, match="must be written to disk"):
        film.contact_sheet(tmp_path / "none" / "sheet.png", "a title", [film.Row("a row", pictures)])
