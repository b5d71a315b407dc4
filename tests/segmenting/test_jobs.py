"""What the segment command is to do: which pictures, which questions, under which ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructsam.segmenting.jobs import MAX_ID, FileJob, find_pictures, jobs_of, read_jobs


def test_files_folders_and_patterns(photos, monkeypatch):
    assert find_pictures([str(photos)]) == [photos / "a.png", photos / "b.PNG", photos / "more/a.png"]
    assert find_pictures([str(photos / "*.png"), str(photos / "a.png")]) == [photos / "a.png"]
    assert find_pictures([str(photos / "**/*.png")]) == [photos / "a.png", photos / "more/a.png"]
    monkeypatch.chdir(photos)
    assert find_pictures(["more", "a.png"]) == [Path("more/a.png"), Path("a.png")]
    (photos / "odd[1].png").write_bytes((photos / "a.png").read_bytes())
    assert find_pictures(["odd[1].png"]) == [Path("odd[1].png")]


def test_names_of_results(photos):
    jobs = jobs_of(find_pictures([str(photos)]), ["stars", "all of it"], [])
    assert [job.id for job in jobs[2:4]] == ["b", "b.2"]
    assert len({job.id for job in jobs}) == 6 and all("/" not in job.id for job in jobs)
    assert jobs[0].id.endswith("photos_a") and jobs[4].id.endswith("more_a")
    assert jobs_of([photos / "a.png"], [], ["x", "y"]) == [FileJob("a", photos / "a.png", None, ("x", "y"))]


def test_a_file_of_jobs(photos):
    path = photos / "jobs.jsonl"
    written = [{"image": "a.png", "instruction": "stars"}, {"image": "more/a.png", "phrases": ["x"], "id": "mine"}]
    path.write_text("\n".join(map(json.dumps, written)) + "\n\n")
    assert read_jobs(path) == [
        FileJob("a", photos / "a.png", "stars", None),
        FileJob("mine", photos / "more/a.png", None, ("x",)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "jobs.jsonl:2: is not valid JSON"),
        ("[" * 100_000, "jobs.jsonl:2: is not valid JSON"),
        ("[]", "jobs.jsonl:2: expected an object with image, instruction, phrases, id"),
        ('{"image": "a.png"}', "jobs.jsonl:2: neither an instruction nor phrases"),
        ('{"instruction": "a"}', "jobs.jsonl:2: image must be the path of a picture, got None"),
        ('{"image": "a.png", "instruction": " "}', "jobs.jsonl:2: the instruction is empty"),
        ('{"image": "a.png", "instruction": "a \\ud800"}', "jobs.jsonl:2: the instruction holds half a character"),
        ('{"image": "a.png", "instruction": 5}', "jobs.jsonl:2: the instruction is no text: 5"),
        ('{"image": "a.png", "phrases": ["a", ""]}', "jobs.jsonl:2: phrases must be a list of words"),
        ('{"image": "a.png", "instruction": "a", "prompt": "b"}', "jobs.jsonl:2: unknown field 'prompt'"),
        ('{"image": "a.png", "instruction": "a", "id": "../x"}', "jobs.jsonl:2: id must be of letters"),
        (json.dumps({"image": "a.png", "instruction": "a", "id": "i" * 151}), "'-', at most 150 bytes"),
        ('{"image": "a.png", "instruction": "a", "id": "first"}', "2 jobs have the id 'first'"),
    ],
)
def test_files_that_are_no_jobs(photos, line, message):
    path = photos / "jobs.jsonl"
    path.write_text('{"image": "a.png", "instruction": "a", "id": "first"}\n' + line)
    with pytest.raises(ValueError) as caught:
        read_jobs(path)
    assert message in str(caught.value)


def test_hidden_pictures_and_written_ones_are_no_input(photos):
    everything = find_pictures([str(photos)])
    for name in (".hidden/a.png", "more/._a.png", "out/overlays/a.png", "out/masks/a/01_x.png", "masks/own.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"")
    (photos / "out/run.json").write_text("{}")
    assert find_pictures([str(photos)]) == sorted([*everything, photos / "masks/own.png"])
    assert find_pictures([str(photos / "out/overlays")]) == [photos / "out/overlays/a.png"]
    assert find_pictures([str(photos / ".hidden")]) == [photos / ".hidden/a.png"]


def test_lines_of_a_file_of_jobs_end_at_line_feeds_only(photos):
    texts = ["two\u2028lines", "next\u0085line", "form\u000cfeed\u2029"]
    written = [json.dumps({"image": "a.png", "instruction": text}, ensure_ascii=False) for text in texts]
    (photos / "jobs.jsonl").write_bytes("\r\n".join(written).encode())
    jobs = read_jobs(photos / "jobs.jsonl")
    assert [job.instruction for job in jobs] == texts
    assert [job.where for job in jobs] == [f"{photos / 'jobs.jsonl'}:{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("letter", ["a", "字"])
def test_ids_of_long_names(letter):
    names = [letter * (255 // len(letter.encode()) - 5) + end for end in ("1", "2")]
    jobs = jobs_of([Path(f"{name}.png") for name in names] + [Path("x", f"{names[0]}.png")], ["stars"], [])
    assert len({job.id for job in jobs}) == 3
    assert all(letter * 40 in job.id and len(job.id.encode()) <= MAX_ID for job in jobs)
    assert [job.id for job in jobs_of([Path("a" * MAX_ID + ".png")], ["stars"], [])] == ["a" * MAX_ID]
