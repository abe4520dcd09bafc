"""The page: a tab for classes and a tab for segments."""

import functools
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vrwkv.app.uploads import open_upload
from vrwkv.classification import Classifier
from vrwkv.runtime.errors import UserError
from vrwkv.visualize import draw_votes, explain, to_picture

Upload = Mapping[str, Any] | None
TOPK = 5
PREVIEW = (384, 1280)  # sides in pixels between which pictures are shown
CSS = """
.alert { color: var(--error-text-color, #b91c1c); font-weight: 600 }
.picture img { width: 100%; height: 100%; object-fit: contain }
.shares { width: 100%; border-collapse: collapse; border: 0 !important }
.shares tr, .shares td { border: 0 !important; padding: 3px 6px !important; text-align: left }
.shares td:nth-child(-n+2) { width: 1%; white-space: nowrap }
.shares td:nth-child(3) { width: 60% }
.shares td:nth-child(4) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.shares i { display: block; height: 1em; border-radius: 3px; border: 1px solid var(--border-color-primary) }
.shares td:first-child i { width: 1em }
"""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # nothing is asked of other hosts


def build_page(
    classifier: Classifier | None,
    segmentor: nn.Module | None,
    max_pixels: int,
    examples: Sequence[Path] = (),
    seg_examples: Sequence[Path] = (),
) -> gr.Blocks:
    """A page for models that are loaded; a tab without one says how to bring one.

    Args:
        classifier: Of the first tab, from `load_classifier`.
        segmentor: Of the second tab, from `vrwkv.segmentation.load_segmentor`.
        max_pixels: Largest height times width of a picture that is opened.
        examples: Pictures below the first tab, to click on.
        seg_examples: The same for the second.
    """
    with gr.Blocks(title="vrwkv", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Vision-RWKV\nDrop a picture. It stays on the machine that serves this page.")
        with gr.Tab("Classify"):
            if classifier is None:
                gr.Markdown("No classifier: run `make demo`, or start with `--checkpoint PATH`.")
            else:
                _classify_tab(classifier, max_pixels, examples)
        with gr.Tab("Segment"):
            if segmentor is None:
                gr.Markdown("No segmentor: run `make demo-seg`, or start with `--config PATH --seg-checkpoint PATH`.")
            else:
                _segment_tab(segmentor, max_pixels, seg_examples)
    return page


def serve(page: gr.Blocks, host: str, port: int, max_megabytes: int) -> None:
    """Serves a page until Ctrl-C.

    Args:
        page: From `build_page`.
        host: Address to listen at; 127.0.0.1 is reached from this machine alone.
        port: Port to listen at.
        max_megabytes: Largest file that is taken.

    Raises:
        UserError: the address cannot be listened at.
    """
    try:
        page.queue(max_size=32).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            max_file_size=f"{max_megabytes}mb", footer_links=[], css=CSS, state_session_capacity=32,
            theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}") from error
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()


def _classify_tab(classifier: Classifier, max_pixels: int, examples: Sequence[Path]) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            picture = _picture(examples, "classify-picture")
        with gr.Column(scale=3):
            message = gr.HTML(visible=False, elem_id="classify-message")
            label = gr.Label(label=f"top {TOPK}", num_top_classes=TOPK, elem_id="classes")
            votes = gr.Plot(show_label=False, format="png", elem_id="votes")
    _on_change(picture, message, [label, votes], lambda image: _classify(classifier, image), max_pixels)


def _classify(classifier: Classifier, image: Image.Image) -> tuple[dict[str, float], Figure | None]:
    """The likeliest classes, and a drawing of why, where the model has patches that vote."""
    batch = classifier.prepare(image)[None].to(classifier.device)  # (1, C, H, W)
    logits, votes, shares = explain(classifier.model, batch)
    (found,) = classifier.rank(logits, TOPK)
    names = [each.label for each in found]
    unique = names if len(set(names)) == len(names) else [f"{each.label} ({each.class_name})" for each in found]
    classes = dict(zip(unique, (each.probability for each in found), strict=True))
    if votes is None:
        return classes, None
    gathered = torch.stack([each[0].mean(-1) for each in shares]).mean(0) if shares else None
    return classes, draw_votes(to_picture(batch[0], classifier), votes[0], unique[0], gathered)


def _segment_tab(segmentor: nn.Module, max_pixels: int, examples: Sequence[Path]) -> None:
    layers = gr.State()  # the picture and the colours of its classes, as shown
    with gr.Row():
        with gr.Column(scale=2):
            picture = _picture(examples, "segment-picture")
        with gr.Column(scale=3):
            message = gr.HTML(visible=False, elem_id="segment-message")
            overlay = gr.Image(
                label="classes", format="png", interactive=False, height=384, elem_id="overlay",
                elem_classes="picture", buttons=["download", "fullscreen"],
            )  # fmt: skip
            opacity = gr.Slider(0, 1, 0.5, step=0.05, label="opacity of the colours", elem_id="opacity")
            shares = gr.HTML(elem_id="shares")
            download = gr.DownloadButton("Download the mask (PNG of class indices)", interactive=False, elem_id="mask")

    def segmented(image: Image.Image, opacity: float) -> tuple[Any, ...]:
        shown, table, mask = _segment(segmentor, image)
        path = save_bytes_to_cache(mask, "mask.png", download.GRADIO_CACHE)
        return shown, Image.blend(*shown, opacity), table, gr.update(value=path, interactive=True)

    _on_change(picture, message, [layers, overlay, shares, download], segmented, max_pixels, [opacity])
    opacity.change(
        lambda shown, opacity: shown and Image.blend(shown[0], shown[1], opacity), [layers, opacity], overlay,
        show_progress="hidden", trigger_mode="always_last", api_visibility="private",
    )  # fmt: skip


def _segment(segmentor: nn.Module, image: Image.Image) -> tuple[tuple[Image.Image, Image.Image], str, bytes]:
    """The picture and its classes in colours as they are shown, the table of shares, and the mask as a PNG file."""
    # In here, so that classifiers are shown without mmsegmentation.
    from vrwkv.segmentation import draw_mask, segment
    from vrwkv.segmentation.engine import config_errors

    with config_errors("the model cannot be run"):
        result = segment(segmentor, image)
    mask, file = draw_mask(result), io.BytesIO()
    mask.save(file, format="png")
    size = _preview_size(*result.picture.size)
    shown = result.picture.resize(size), mask.convert("RGB").resize(size, Image.Resampling.NEAREST)
    return (
        shown,
        _shares_table(result.shares(), dict(zip(result.classes, result.palette, strict=True))),
        file.getvalue(),
    )


def _preview_size(width: int, height: int) -> tuple[int, int]:
    small, large = PREVIEW
    scale = min(max(1.0, small / max(width, height)), large / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shares_table(shares: Mapping[str, float], colours: Mapping[str, tuple[int, int, int]]) -> str:
    rows = [
        f'<tr><td><i style="background: rgb{colours[name]}"></i></td><td>{html.escape(name)}</td>'
        f'<td><i style="background: rgb{colours[name]}; width: {100 * share:.2f}%"></i></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for name, share in shares.items()
    ]
    return f'<table class="shares">{"".join(rows)}</table>'


def _picture(examples: Sequence[Path], name: str) -> gr.Image:
    picture = gr.Image(
        label="picture", sources=["upload", "clipboard"], type="filepath", image_mode=None, height=384,
        elem_id=name, elem_classes="picture",
    )  # fmt: skip
    if examples:
        gr.Examples([str(path) for path in examples], picture, label="or one of these", examples_per_page=20)
    return picture


def _on_change(
    picture: gr.Image,
    message: gr.HTML,
    outputs: list[Any],
    show: Callable[..., tuple[Any, ...]],
    max_pixels: int,
    settings: Sequence[Any] = (),
) -> None:
    """Fills `outputs` by `show` when the picture changes; where that fails, empties them and says why in `message`."""
    nothing = [gr.update(value=None, interactive=False) if isinstance(each, gr.DownloadButton) else None
               for each in outputs]  # fmt: skip

    @functools.wraps(show)
    def changed(upload: Upload, *values: Any) -> list[Any]:
        if not upload:
            return [gr.update(visible=False), *nothing]
        try:
            return [gr.update(visible=False), *show(open_upload(upload, max_pixels), *values)]
        except UserError as error:
            text = f'<p class="alert" role="alert">{html.escape(str(error))}</p>'
            return [gr.update(value=text, visible=True), *nothing]

    # Without gradio's own preprocessing, which would decode pictures of any size first; it has checked the path.
    picture.change(
        changed, [picture, *settings], [message, *outputs], preprocess=False, api_visibility="private",
        show_progress_on=outputs[0] if len(outputs) == 2 else outputs[1],
    )  # fmt: skip
