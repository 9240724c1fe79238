"""Pictures are PNG files under the name that was given, or one line."""

from pathlib import Path

import pytest
from PIL import Image

from darht.core.errors import DarhtError
from darht.tools.pictures import figure, save


@pytest.mark.parametrize("name", ["sheet.png", "sheet.txt", "sheet"])
def test_a_picture_is_a_png_whatever_its_name(name: str, tmp_path: Path) -> None:
    drawing = figure(1, 1)
    drawing.add_subplot()
    save(drawing, tmp_path / "new" / name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    with Image.open(tmp_path / "new" / name) as picture:
        assert (picture.format, picture.size) == ("PNG", (150, 150))


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DarhtError, match=r"^cannot write .*/file/sheet.png: File exists"):
        save(figure(1, 1), tmp_path / "file" / "sheet.png")
