"""A page in the browser that classifies and segments pictures; needs gradio, the extra `vrwkv[app]`."""

from vrwkv.runtime.errors import MissingExtra

try:
    import gradio as _gradio  # noqa: F401
except ImportError as error:
    raise MissingExtra(f"vrwkv.app needs gradio ({error}): pip install 'vrwkv[app]'") from error

from vrwkv.app.page import build_page, serve

__all__ = ["build_page", "serve"]
