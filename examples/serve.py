"""A page in the browser: drag an image in, see its classes, take the mask home.

pip install fastapi uvicorn
python examples/serve.py logs/mine/version_0/checkpoints/best.ckpt

Then open http://127.0.0.1:8000. Programs send the bytes of a file and get JSON back:
curl --data-binary @street.jpg "http://127.0.0.1:8000/predict?name=street.jpg"

One image is labelled at a time. There is no login: `--host 0.0.0.0` lets the whole network in.
"""

from __future__ import annotations

import base64
import io
import tempfile
import threading
import time
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from PIL import Image

import seglab
from seglab.data.sources.reading import IMAGE_SUFFIXES, read_shape
from seglab.visualize import as_mask, as_rgb

MAX_BYTES = 25_000_000
MAX_PIXELS = 40_000_000
SHOWN_SIDE = 1600  # longest side of what the page shows; the mask keeps the image's size
PAGE = Path(__file__).with_suffix(".html")


def create_app(model: Any, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> FastAPI:
    """Build the application around a model.

    Args:
        model: What `seglab.load` returned.
        max_bytes: Of an upload; what comes after is not read.
        max_pixels: Of an image; looked up before it is decoded.

    Raises:
        ValueError: The model has more classes than a mask file can hold.
    """
    if len(model.class_names) > 256:
        raise ValueError(f"{len(model.class_names)} classes: a mask of 8 bits holds 256 at most")
    app = FastAPI(title="seglab", docs_url=None, redoc_url=None)
    one_at_a_time = threading.Lock()

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/model")
    def about() -> dict[str, Any]:
        return {"classes": _classes(model), "suffixes": IMAGE_SUFFIXES, "max_bytes": max_bytes}

    @app.post("/predict")
    async def predict(request: Request, name: str = "image.jpg") -> dict[str, Any]:
        name = Path(name.replace("\\", "/")).name or "image"
        suffix = Path(name).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise HTTPException(415, f"{name} is not named like an image: send one of {kinds}")
        content = await read_limited(request, name, max_bytes)

        def work() -> dict[str, Any]:
            with one_at_a_time, tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"image{suffix}")
                path.write_bytes(content)
                return label_file(model, path, name, max_pixels)

        return await run_in_threadpool(work)

    return app


async def read_limited(request: Request, name: str, max_bytes: int) -> bytes:
    """Read an upload, and no more of it than is allowed.

    Raises:
        HTTPException: It is empty or too large.
    """
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise HTTPException(
                413, f"{name} is larger than the {max_bytes / 1e6:g} MB that are taken: shrink it"
            )
    if not content:
        raise HTTPException(400, f"{name} is empty: send the bytes of an image file")
    return bytes(content)


def label_file(model: Any, path: Path, name: str, max_pixels: int) -> dict[str, Any]:
    """Label one file.

    Args:
        model: What `seglab.load` returned.
        path: Of the file.
        name: What its owner calls it.
        max_pixels: Of an image.

    Raises:
        HTTPException: It is unreadable, too large, or not what the model takes.
    """
    pixels = _read(model, path, name, max_pixels)
    started = time.perf_counter()
    ids = model.label([pixels])[0]
    seconds = time.perf_counter() - started
    mask = as_mask(ids)
    return {
        "name": name,
        "width": int(mask.shape[1]),
        "height": int(mask.shape[0]),
        "seconds": round(seconds, 3),
        "picture": _uri(_shrunk(Image.fromarray(as_rgb(pixels)), smooth=True), "JPEG"),
        "layer": _uri(_shrunk(_indexed(model, mask), smooth=False), "PNG"),
        "mask": _uri(_indexed(model, mask), "PNG"),
        "shares": shares(model, ids),
    }


def _read(model: Any, path: Path, name: str, max_pixels: int) -> Any:
    try:
        with warnings.catch_warnings():  # Pillow's limit is not ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            height, width = read_shape(path)
        if height * width <= max_pixels:
            return model.read(path)
        size = f"{width} x {height}"
    except Image.DecompressionBombError:
        size = "far too many"
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        sentence = str(error).replace(str(path), name)
        raise HTTPException(422, f"{name} cannot be labelled: {sentence}") from error
    raise HTTPException(
        413, f"{name} has {size} pixels, at most {max_pixels / 1e6:g} million are taken: shrink it"
    )


def shares(model: Any, ids: Any) -> list[dict[str, Any]]:
    """The classes of an image and their parts of its pixels, the largest first."""
    counts = np.bincount(np.asarray(ids).ravel(), minlength=len(model.class_names))
    found = [
        entry | {"share": int(counts[index]) / ids.size}
        for index, entry in enumerate(_classes(model))
        if counts[index]
    ]
    return sorted(found, key=lambda entry: -entry["share"])


def _classes(model: Any) -> list[dict[str, str]]:
    colors = model.palette.tolist()
    return [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
        for name, color in zip(model.class_names, colors, strict=True)
    ]


def _indexed(model: Any, mask: Any) -> Image.Image:
    picture = Image.fromarray(mask)
    picture.putpalette(model.color_table.tobytes())
    return picture


def _shrunk(picture: Image.Image, *, smooth: bool) -> Image.Image:
    factor = min(1.0, SHOWN_SIDE / max(picture.size))
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return picture.resize(size, how)  # type: ignore[arg-type]


def _uri(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def main() -> None:
    """Serve a checkpoint."""
    import uvicorn

    parser = ArgumentParser(description="Label images in the browser.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of fit")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU if there is one")
    options = parser.parse_args()
    model = seglab.load(options.checkpoint, device=options.device)
    uvicorn.run(create_app(model), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
