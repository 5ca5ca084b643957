"""The page of the app: inputs, buttons, and where the answers go (gradio)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import gradio as gr
import numpy as np

from medalign_jax.app import render
from medalign_jax.app.listener import Listener, read_sound, shown_name
from medalign_jax.core.errors import UserError
from medalign_jax.language_model import LanguageModel

MAX_UPLOAD = 64 * 2**20  # bytes
MOST_TEXTS = 20
MOST_TOKENS = 512  # of an answer
_KEPT = (60, 120)  # seconds: how often old uploads are looked for, and how old they get
_HEAD = "For research; **not a medical device**. Sounds stay on this machine and are deleted."
_TEXTS = "Words to compare with, one per line"


class Answers:
    """What the buttons call."""

    def __init__(self, listeners: Sequence[Listener], model: LanguageModel | None):
        self.listeners, self.model = tuple(listeners), model
        self._busy = threading.Lock()  # one program at a time has the device

    def listen(self, path: str | None, texts: str = "") -> tuple[str, str]:
        """HTML of the sound, and of what the checkpoints say of it."""
        if not path:
            return "", ""
        try:
            heard, asked = read_sound(path), _lines(texts)
            with self._busy:
                found = [each.listen(heard.waveform, heard.rate, asked) for each in self.listeners]
        except UserError as error:
            return render.problem(_without_folder(error, path)), ""
        return render.sound(heard, shown_name(path)), render.heard(found)

    def ask(self, path: str | None, question: str, options: str) -> str:
        """HTML of the language model's answer."""
        if not path or not question.strip():
            missing = "Write a question." if path else "Drop or record a sound first."
            return render.problem(missing)
        try:
            tokens = min(MOST_TOKENS, self.model.text.max_positions // 2)
            with self._busy:
                said = self.model.answer(
                    question, path, choices=_lines(options), max_new_tokens=tokens
                )
            return render.response(said)
        except UserError as error:
            return render.problem(_without_folder(error, path))


def blocks(listeners: Sequence[Listener], model: LanguageModel | None) -> gr.Blocks:
    """The page.

    Args:
      listeners: checkpoints; two or more stand side by side.
      model: an audio language model to ask, or None.
    """
    answers = Answers(listeners, model)
    with gr.Blocks(title="medalign", analytics_enabled=False, delete_cache=_KEPT) as page:
        gr.Markdown(f"# What does it sound like?\n\n{_HEAD}")
        sound = gr.Audio(
            sources=["upload", "microphone"], type="filepath", label="Drop or record a sound",
            format="wav", editable=False, buttons=[], elem_id="sound",
        )  # fmt: skip
        shown, inputs = gr.HTML(elem_id="shown"), [sound]
        triggers = [sound.change]
        if any(listener.space is not None for listener in listeners):
            inputs.append(
                gr.Textbox(
                    _example(listeners),
                    label=_TEXTS,
                    lines=2,
                    max_lines=MOST_TEXTS,
                    max_length=4000,
                )
            )
            triggers.append(gr.Button("Compare", elem_id="compare").click)
        heard = gr.HTML(elem_id="heard")
        gr.on(triggers, answers.listen, inputs, [shown, heard], api_visibility="private")
        if model is not None:
            gr.Markdown("## Ask about it")
            question = gr.Textbox("Is there a murmur?", label="Question", max_length=2000)
            options = gr.Textbox(label="Options to choose from, one per line (or none)", lines=2)
            button = gr.Button("Ask", elem_id="ask")
            answer = gr.HTML(elem_id="answer")
            button.click(answers.ask, [sound, question, options], answer, api_visibility="private")
    return page


def _example(listeners: Sequence[Listener]) -> str:
    """Two training reports that say different things: words are best written as reports are."""
    meetings = [listener.space.meeting for listener in listeners if listener.space is not None]
    for meeting in meetings:
        if len(meeting.reports) > 1:
            other = int(np.argmin(meeting.vectors @ meeting.vectors[0]))
            return f"{meeting.reports[0]}\n{meeting.reports[other]}"
    return ""


def _without_folder(error: UserError, path: str) -> str:
    """The message; where uploads lie on this machine is nobody's business."""
    return str(error).replace(path, shown_name(path))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()][:MOST_TEXTS]


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serves the page in threads; returns its address.

    Raises:
      OSError: the port is taken.
    """
    system = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["monospace"])  # else fonts come by network
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
        max_file_size=MAX_UPLOAD, footer_links=[], ssr_mode=False, theme=theme, show_error=True,
        css=render.asset("app.css"), head=f"<script>{render.asset('app.js')}</script>",
    )  # fmt: skip
    return url
