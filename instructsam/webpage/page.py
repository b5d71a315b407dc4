"""The web page (Gradio): upload, ask, look, take home. `python -m instructsam.demo` shows it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr  # noqa: E402

from instructsam.inference.results import Result  # noqa: E402
from instructsam.webpage.asking import (  # noqa: E402
    HIGHEST,
    LOWEST,
    Asker,
    Conversation,
    label_of,
    picture_of,
    rows_of,
    timings_of,
    visible,
)
from instructsam.webpage.downloads import FORMATS, Downloads  # noqa: E402

TITLE = "InstructSAM"
COLUMNS = ["#", "phrase", "score", "pixels", "%"]
CSS = """
.gradio-container { max-width: min(1200px, 100vw) !important; margin: auto !important; }
footer { display: none !important; }
#table, #examples { overflow-x: auto; }
#examples td, #examples span { white-space: normal !important; min-width: 0 !important; }
"""
DRAWN_AT_ONCE = 4
FONTS = ["system-ui", "sans-serif"]
# Gives the visitor a file: a DownloadButton would hand out what it held before the click that made the file.
SAVE = """(file) => {
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name;
    link.click();
}"""


def path_only(payload: Any) -> str | None:
    """The path of an uploaded file; nothing is decoded: what is wrong with it is said by `Asker`, in plain words."""
    return None if payload is None else payload.path


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own computer: nothing is fetched from anywhere."""
    return gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])


def build_page(
    asker: Asker, examples: Sequence[tuple[str, str]], default_threshold: float, about: str, max_waiting: int = 40
) -> gr.Blocks:
    """The page.

    Args:
        asker: answers the questions.
        examples: (path of a picture, instruction).
        default_threshold: where the slider stands, `LOWEST` to `HIGHEST`.
        about: a line about the model.
        max_waiting: visitors that wait, further ones are told to come again.
    """
    downloaded = Downloads()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        conversation = gr.State(None, time_to_live=3600)
        gr.Markdown(f"# {TITLE}\nSegments every instance that an instruction asks for. {about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                    height=320, elem_id="picture",
                )  # fmt: skip
                # Not by a class of its own: Gradio would write a .pyi file beside this one.
                picture.preprocess = path_only  # type: ignore[method-assign, assignment]
                instruction = gr.Textbox(
                    label="Instruction", placeholder="all circles left of the star", elem_id="instruction"
                )
                phrases = gr.Textbox(
                    label="Or phrases, separated by commas", placeholder="red circles, stars", elem_id="phrases"
                )
                ask = gr.Button("Segment", variant="primary", elem_id="ask")
            with gr.Column(scale=1, min_width=260):
                shown = gr.Image(
                    label="Instances",
                    interactive=False,
                    format="png",
                    height=420,
                    elem_id="overlay",
                    buttons=["fullscreen"],
                )
                answer = gr.Textbox(label="The model's answer", interactive=False, elem_id="answer")
                threshold = gr.Slider(
                    LOWEST, HIGHEST, default_threshold, step=0.05, label="Score threshold", elem_id="threshold"
                )
                chosen = gr.CheckboxGroup(label="Shown instances", choices=[], elem_id="chosen")
                table = gr.Dataframe(headers=COLUMNS, interactive=False, label="Instances", elem_id="table")
                with gr.Row():
                    buttons = [
                        gr.Button(name, size="sm", min_width=60, interactive=False, elem_id=f"download-{name.lower()}")
                        for name in FORMATS
                    ]
                files = [gr.File(visible="hidden") for _ in FORMATS]
                timings = gr.Markdown(elem_id="timings")
                history = gr.Radio(label="Asked about this picture", choices=[], visible=False, elem_id="history")
        if examples:
            gr.Examples(
                [list(example) for example in examples], [picture, instruction], label="Examples", elem_id="examples"
            )

        outcome = [shown, table]
        everything = [conversation, answer, timings, history, chosen, *outcome, *buttons]

        def of_result(result: Result, indices: list[int]) -> list[int]:
            """Without those of another answer, whose ticks were still on the page."""
            return sorted(k for k in indices if 0 <= k < len(result))

        def view(talk: Conversation | None, least: float) -> list[Any]:
            """All that depends on which answer is shown."""
            if talk is None or talk.result is None:
                return [gr.skip()] * len(everything)
            result = talk.result
            names = [f"{k + 1}. {one.instruction}" for k, one in enumerate(talk.results)]
            asked = gr.Radio(choices=names, value=names[talk.shown], visible=len(names) > 1)
            cut = "" if result.finished else " (cut off)"
            text = result.answer.replace("<|object_ref_start|>", "[").replace("<|object_ref_end|>", "]") + cut
            ready = [gr.Button(interactive=True)] * len(buttons)
            return [talk, text, timings_of(result), asked, *at_threshold(talk, least), *ready]

        def at_threshold(talk: Conversation | None, least: float) -> list[Any]:
            """All that depends on the threshold: every instance above it is shown."""
            if talk is None or talk.result is None:
                return [gr.skip()] * (1 + len(outcome))
            indices = visible(talk.result, least)
            names = [(label_of(talk.result, k), k) for k in indices]
            return [gr.CheckboxGroup(choices=names, value=indices), *with_instances(talk, indices)]

        def with_instances(talk: Conversation | None, indices: list[int]) -> list[Any]:
            """All that depends on which instances are shown."""
            if talk is None or talk.result is None:
                return [gr.skip()] * len(outcome)
            indices = of_result(talk.result, indices)
            return [picture_of(talk.result, indices), rows_of(talk.result, indices)]

        def write(format: str, talk: Conversation | None, indices: list[int]) -> str:
            if talk is None or talk.result is None:
                raise gr.Error("The answer is no longer kept: ask again.", print_exception=False)
            return downloaded.write(talk.result, of_result(talk.result, indices), format)

        def run(talk: Conversation | None, path: str | None, text: str, words: str) -> Conversation:
            try:
                return asker.ask(talk or Conversation(), path, text or "", words or "")
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error

        def look_back(talk: Conversation | None, name: str | None, least: float) -> list[Any]:
            if not name or talk is None:
                return [gr.skip()] * len(everything)
            place = int(name.split(".", 1)[0]) - 1
            return view(Conversation(talk.picture, talk.results, min(place, len(talk.results) - 1)), least)

        # Beside the model and each other, for a few visitors at once.
        drawing: dict[str, Any] = {
            "concurrency_id": "drawing",
            "concurrency_limit": DRAWN_AT_ONCE,
            "api_visibility": "private",
        }
        question = [conversation, picture, instruction, phrases]
        for asked in (ask.click, instruction.submit, phrases.submit):
            answered = asked(
                run, question, conversation, concurrency_id="model", concurrency_limit=1,
                show_progress_on=[answer, *outcome], api_visibility="private",
            )  # fmt: skip
            answered.success(view, [conversation, threshold], everything, **drawing)
        # As it slides, by mouse or keyboard; what comes while one is drawn waits for the last of it.
        lightly: dict[str, Any] = {**drawing, "trigger_mode": "always_last", "show_progress": "hidden"}
        threshold.change(at_threshold, [conversation, threshold], [chosen, *outcome], **lightly)
        chosen.input(with_instances, [conversation, chosen], outcome, **lightly)
        history.input(look_back, [conversation, history, threshold], everything, **lightly)
        for name, button, file in zip(FORMATS, buttons, files, strict=True):
            made = button.click(
                partial(write, name), [conversation, chosen], file,
                api_name=f"write_{name.lower()}", show_progress_on=timings, **drawing,
            )  # fmt: skip
            made.success(None, file, js=SAVE)
    return page.queue(max_size=max_waiting)
