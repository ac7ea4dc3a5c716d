"""The text-to-image commands, on the digits and tiny budgets."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")


from immunize_ext.cli import main
from immunize_ext.ops import read_lora
from immunize_ext.storage import work_folder
from immunize_ext.text_to_image import run as runs
from immunize_ext.text_to_image.attacks import ATTACKS
from immunize_ext.text_to_image.model import TextToImage

TINY = [
    *("--set", "steps=2", "--set", "batch_size=2", "--set", "retain_batch=2"),
    *("--attacks", "lora", "--attack-steps", "2", "--images", "2", "--sampling-steps", "2"),
    *("--threads", "1", "--quiet"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run."""
    folder = tmp_path_factory.mktemp("runs") / "mima"
    assert main(["mima", "--out", str(folder), "--seed", "0", "1", *TINY]) == 0
    return folder


def test_a_run_is_complete(run, capsys):
    results = json.loads((run / "results.json").read_text())
    assert results["kind"] == "mima"
    assert results["method"] == "mima"
    mima = results["mima"]
    for name in (
        "msgr",
        "retained_before",
        "retained_after",
        "control_sgr",
        "curves",
        "seeds",
        "merge_share",
    ):
        assert name in mima
    assert mima["seeds"] == [0, 1]
    assert [row["method"] for row in mima["methods"]] == ["mima", "loss_ascent"]
    assert all(len(row["retained_change"]) == 2 for row in mima["methods"])
    assert mima["curves"]["lora"]["steps"] == [0, 1, 2]
    assert len(mima["curves"]["lora"]["immunized"][0]["values"]) == 2
    assert results["evaluation"]["seeds"] == [0, 1]
    assert results["evaluation"]["measures"] == ["accuracy", "second judge", "any digit"]
    assert sorted(results["evaluation"]["judge_errors"]) == ["eight", "five", "three"]
    assert len(mima["unattacked"]) == len(results["evaluation"]["step_zero"]) / 3 == 4
    page = (run / "report.html").read_text()
    for words in (
        "What was protected",
        "Against whom",
        "At what cost",
        "Not against",
        "Control",
        "Plain loss ascent",
        "Before any attack",
        "corrected for the judge's errors",
        "who asks by another word was not tried",
    ):
        assert words.lower() in page.lower()
    assert "http" not in page.replace("http://www.w3.org", "")
    TextToImage.from_pretrained(run / "pipeline")
    card = (run / "pipeline" / "README.md").read_text()
    assert "## Who gets through" in card
    assert not work_folder(run).exists()


def test_an_existing_run_is_not_touched(run, capsys):
    before = (run / "results.json").read_bytes()
    assert main(["mima", "--out", str(run), *TINY]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before


def test_attack_adds_and_report_compares(run, tmp_path, capsys):
    before = (run / "results.json").read_bytes()
    arguments = ["--attacks", "kv_fine_tuning", "--budgets", "1", "--quiet"]
    assert main(["attack", str(run), *arguments]) == 0
    page, file = sorted((run / "attacks").iterdir())
    assert (page.name, file.name) == ("001.html", "001.json")
    assert "Fine-tuning of K and V" in page.read_text()
    assert json.loads(file.read_text())["evaluation"]["attacks"] == ["kv_fine_tuning"]
    assert (run / "results.json").read_bytes() == before
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert "1 run compared" in (tmp_path / "report" / "report.html").read_text()
    (row,) = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert row["concepts"] == 3


def test_attack_with_settings_that_were_searched_for(run, capsys):
    pytest.importorskip("optuna")
    arguments = ["--attacks", "kv_fine_tuning", "--budgets", "1", "--search", "2", "--quiet"]
    assert main(["attack", str(run), *arguments]) == 0
    *_, file = sorted((run / "attacks").glob("*.json"))
    record = json.loads(file.read_text())
    (found,) = record["search"]
    assert (found["attack"], found["trials"]) == ("kv_fine_tuning", 2)
    assert "Settings that were searched for" in file.with_suffix(".html").read_text()
    # What is measured is what was found.
    curve = record["evaluation"]["comparisons"][0]["curves"]["immunized"][0]
    assert curve["config"]["learning_rate"] == found["settings"]["learning_rate"]
    assert main(["attack", str(run), "--search", "-1"]) == 2
    assert "search must be at least 0" in capsys.readouterr().err


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    target = tmp_path / "run"
    arguments = ["mima", "--out", str(target), *TINY, "--targets", "three"]
    whole = runs.evaluate_text_to_image

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "evaluate_text_to_image", interrupted)
    assert main(arguments) == 130
    assert not target.exists()
    (kept,) = work_folder(target).glob("immunized-*/pipeline/immunized.json")
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr(runs, "evaluate_text_to_image", whole)
    record = json.loads(kept.read_text())
    assert main(arguments) == 0
    # Immunized once: the record with its seconds is that of the first try.
    assert json.loads((target / "results.json").read_text())["history"] == record["history"]
    assert written
    assert not work_folder(target).exists()


def test_a_run_that_was_cut_off_is_not_finished_as_another(tmp_path, monkeypatch, capsys):
    target = tmp_path / "run"
    whole = runs.evaluate_text_to_image

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "evaluate_text_to_image", interrupted)
    assert main(["mima", "--out", str(target), *TINY, "--targets", "three", "five"]) == 130
    monkeypatch.setattr(runs, "evaluate_text_to_image", whole)
    other = ["--method", "loss_ascent", "--targets", "seven", "--learning-rate", "0.5"]
    assert main(["mima", "--out", str(target), *TINY, *other, "--no-erase"]) == 0
    results = json.loads((target / "results.json").read_text())
    record = json.loads((target / "pipeline" / "immunized.json").read_text())
    assert record["method"] == results["method"] == "loss_ascent"
    assert record["config"]["concepts"] == results["evaluation"]["targets"] == ["seven"]
    assert record["config"]["learning_rate"] == 0.5
    fresh = tmp_path / "fresh"
    assert main(["mima", "--out", str(fresh), *TINY, *other, "--no-erase"]) == 0
    for file in ("unet/diffusion_pytorch_model.safetensors", "SHA256SUMS"):
        one, again = ((folder / "pipeline" / file).read_bytes() for folder in (target, fresh))
        # The record beside the weights has the seconds of its own run.
        lines = [[ln for ln in b.splitlines() if b"immunized.json" not in ln] for b in (one, again)]
        assert lines[0] == lines[1]


def test_imma_takes_one_concept(tmp_path, capsys):
    arguments = ["imma", "--out", str(tmp_path / "run"), *TINY]
    assert main(arguments) == 2
    assert "must be one concept" in capsys.readouterr().err
    assert main([*arguments, "--targets", "three"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["method"] == "imma"


def test_erase(tmp_path, capsys):
    target = tmp_path / "erased"
    assert main(["erase", "--targets", "three", "--out", str(target), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "8 text projections (4 K, 4 V)" in said
    assert "three: 'three' in 8 of 8 prompts becomes 'digit'" in said
    model = TextToImage.from_pretrained(target)
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    original = TextToImage(load_digits_pipeline())
    changed = [
        name
        for (name, ours), theirs in zip(
            model.unet.named_parameters(), original.unet.parameters(), strict=True
        )
        if not torch.equal(ours, theirs)
    ]
    assert len(changed) == 8
    assert all(".attn2.to_" in name for name in changed)
    assert main(["erase", "--targets", "three", "--out", str(target), "--quiet"]) == 2
    record = json.loads((target / "erasure.json").read_text())
    assert record["command"] == f"immunize erase --targets three --out {target} --quiet"
    assert record["concepts"] == ["three"]
    assert record["base_model_digest"] == original.digest()
    assert record["environment"]["torch"] == torch.__version__
    now, before = (dict(one.unet.named_parameters()) for one in (model, original))
    assert set(record["relative_changes"]) == set(changed)
    for name, share in record["relative_changes"].items():
        moved = (now[name].detach() - before[name].detach()).norm() / before[name].detach().norm()
        assert share == pytest.approx(moved.item(), rel=1e-5)


def test_the_adapter_of_a_run_is_what_the_run_did(run, tmp_path, capsys):
    """diffusers adds it to the plain model and has the immunized one, biases included."""
    pytest.importorskip("peft")
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    out = tmp_path / "adapter"
    assert main(["export-lora", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "numerical rank of the change" in said
    assert "4 biases changed and are in it" in said
    assert "to be added to: digits" in said
    pipeline = load_digits_pipeline()
    pipeline.load_lora_weights(str(out))
    immunized = TextToImage.from_pretrained(run / "pipeline")
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, pipeline.unet.config.in_channels, 8, 8, generator=generator),
        torch.tensor([10, 500]),
        immunized.conditioning(["a photo of the digit three", "a five"]).hidden.detach(),
    )
    with torch.no_grad():
        plain = load_digits_pipeline().unet(*inputs).sample
        ours, truth = pipeline.unet(*inputs).sample, immunized.unet(*inputs).sample
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert (truth - plain).abs().max() > 1e-2
    assert main(["export-lora", str(run), "--out", str(out)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_the_adapter_of_an_erasure_at_a_rank(tmp_path, capsys):
    target, out = tmp_path / "erased", tmp_path / "adapter"
    assert main(["erase", "--targets", "three", "--out", str(target), "--quiet"]) == 0
    arguments = ["export-lora", str(target), "--out", str(out), "--format", "peft"]
    capsys.readouterr()
    assert main([*arguments, "--rank", "4"]) == 0
    assert "8 layers, rank 4; numerical rank of the change" in capsys.readouterr().out
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    refused = ["--out", str(tmp_path / "other"), "--model", str(target)]
    assert main(["export-lora", str(target), *refused]) == 2
    assert "must be the one that was erased from" in capsys.readouterr().err
    assert main(["export-lora", str(target), *refused[:2], "--rank", "0"]) == 2
    assert "rank must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_run_of_features_has_no_adapter(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"kind": "kappa", "schema": 2}')
    assert main(["export-lora", str(tmp_path), "--out", str(tmp_path / "adapter")]) == 2
    assert "got kappa, which has no adapter" in capsys.readouterr().err


def test_sweep_over_concepts_resumes(tmp_path, capsys):
    target = tmp_path / "sweep"
    # The method that every other is compared with: a point is one immunization.
    tiny = [*TINY, "--method", "loss_ascent", "--counts", "1", "2"]
    arguments = ["sweep", "mima", "--out", str(target), *tiny]
    assert main(arguments) == 0
    points = sorted((target / "points").iterdir())
    assert [path.stem for path in points] == ["count1-seed0", "count2-seed0"]
    stamps = [path.stat().st_mtime_ns for path in points]
    points[1].unlink()
    assert main(arguments) == 0
    assert points[0].stat().st_mtime_ns == stamps[0]
    assert points[1].is_file()
    assert "number of concepts" in (target / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mima", "--method", "mimaa"), "did you mean mima"),
        (("mima", "--attacks", "lor"), "did you mean lora"),
        (("mima", "--set", "stepz=3"), "did you mean steps"),
        (("mima", "--set", "steps=many"), "steps must be an integer, got 'many'"),
        (("mima", "--set", "steps"), "must look like NAME=VALUE"),
        (("mima", "--set", "inner_steps=0"), "inner_steps must be at least 1, got 0"),
        (("mima", "--targets", "ten"), "names must be among zero"),
        (("mima", "--control", "three"), "control: must be no target, got 'three'"),
        (("mima", "--seed", "1", "1"), "must be different seeds"),
        (("mima", "--images", "0"), "images must be at least 1, got 0"),
        (("mima", "--model", "nowhere"), "must be a folder with model_index.json, got nowhere"),
        (("mima", "--config", "no.yaml"), "must name a YAML file, got no.yaml"),
        (("mima", "--concepts", "c.yaml"), "concepts: must go with a model of your own"),
        (("sweep", "mima", "--counts", "11"), "must be 1 to 10 concepts, got 11"),
        (("attack", "nowhere"), "must be a run directory"),
        (("mima", "--guidance", "inf"), "guidance must be a finite number"),
        (("mima", "--threshold", "nan"), "threshold must be a finite number"),
        (("mima", "--threshold", "-5"), "threshold must lie in (0, 1], got -5"),
        (("mima", "--evaluate-at", "99999"), "evaluate_at must ascend from 0 to at most"),
        (("mima", "--set", "checkpoint_every=0"), "checkpoint_every must be at least 1"),
        (("mima", "--set", "steps=.inf"), "steps must be an integer"),
        (("erase", "--ridge", "nan"), "ridge must be a finite number"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    # Progress may have been shown before; what went wrong is one line.
    assert message in error[-1]
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_missing_pieces_of_a_model_of_ones_own(tmp_path, capsys):
    from attack_pipelines import tiny_pipeline

    TextToImage(tiny_pipeline()).save(tmp_path / "model")
    out = ["--out", str(tmp_path / "run")]
    assert main(["mima", "--model", str(tmp_path / "model"), *out]) == 2
    assert "concepts: must name a concepts.yaml" in capsys.readouterr().err
    arguments = ["mima", "--model", str(tmp_path / "model"), "--concepts", "none.yaml", *out]
    assert main(arguments) == 2
    assert "there is no file none.yaml" in capsys.readouterr().err


@pytest.fixture
def own_model(tmp_path):
    """Flags of a tiny random model of Stable Diffusion's classes, with two concepts."""
    from attack_pipelines import tiny_pipeline

    return flags_of(tiny_pipeline(), tmp_path)


def flags_of(pipeline, tmp_path):
    """Flags of a pipeline, written to a folder beside two concepts with images."""
    from PIL import Image

    TextToImage(pipeline).save(tmp_path / "model")
    lines = ["concepts:"]
    for index, name in enumerate(("three", "five")):
        folders = []
        for split in ("attack", "immunize"):
            folder = tmp_path / name / split
            folder.mkdir(parents=True)
            for image in range(2):
                shade = 40 * index + 20 * image + (10 if split == "attack" else 0)
                Image.new("RGB", (8, 8), (shade, 255 - shade, 90)).save(folder / f"{image}.png")
            folders.append(f"{split}: {name}/{split}")
        lines.append(
            f'  - {{name: {name}, prompts: ["a photo of the digit {{}}", "a handwritten {{}}"], '
            f"anchor: digit, images: {{{', '.join(folders)}}}}}"
        )
    lines += ["captions: [a red dog, a blue cat, an artwork]"]
    (tmp_path / "concepts.yaml").write_text("\n".join(lines) + "\n")
    return ["--model", str(tmp_path / "model"), "--concepts", str(tmp_path / "concepts.yaml")]


def test_a_model_of_ones_own_takes_the_rates_of_stable_diffusion(own_model, tmp_path, capsys):
    """They are said; flags of method and attack go before them; the digits keep theirs."""
    small = ["--steps", "1", "--loss-clamp", "100", "--batch-size", "2", "--threads", "1"]
    out = ["--out", str(tmp_path / "run"), "--quiet"]
    chosen = ["--inner-rate", "1e-4", "--full-fine-tuning.learning-rate", "2e-6"]
    assert main(["mima", *own_model, *small, *chosen, *out]) == 0
    assert (
        "rates: mima learning_rate 3e-05, inner_rate 0.0001; lora learning_rate 0.0001; "
        "full_fine_tuning learning_rate 2e-06"
    ) in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["immunizer"]["learning_rate"] == 3e-5
    assert results["immunizer"]["inner_rate"] == 1e-4
    # Adam's first step is its rate, whatever the gradient.
    before = TextToImage.from_pretrained(tmp_path / "model").unet.state_dict()
    after = TextToImage.from_pretrained(tmp_path / "run" / "pipeline").unet.state_dict()
    kv = [name for name in before if "attn2.to_q.weight" in name]
    for name in kv:
        assert (after[name] - before[name]).abs().max() == pytest.approx(3e-5, rel=0.05)


def test_a_joint_model_is_immunized_and_attacked_by_the_same_commands(tmp_path):
    from attack_pipelines import tiny_flux_pipeline
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    judge = ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    judge.save_pretrained(tmp_path / "dino")
    model = flags_of(tiny_flux_pipeline(), tmp_path)
    small = ["--steps", "1", "--loss-clamp", "100", "--batch-size", "2", "--merge", "by_class"]
    judged = ["--dino", str(tmp_path / "dino"), "--images", "1", "--sampling-steps", "1"]
    attack = ["--attacks", "lora", "--quiet"]
    target, steps = tmp_path / "run", ["--attack-steps", "1", "--threads", "1"]
    assert main(["mima", *model, *small, *judged, *attack, *steps, "--out", str(target)]) == 0
    results = json.loads((target / "results.json").read_text())
    assert "1 context, 1 pooled" in results["mima"]["projections"]
    assert results["mima"]["curves"]["lora"]["steps"] == [0, 1]
    assert main(["attack", str(target), *attack, "--budgets", "1", "--lora.rank", "2"]) == 0
    assert main(["erase", *model, "--out", str(tmp_path / "erased"), "--quiet"]) == 0
    changed = json.loads((tmp_path / "erased" / "erasure.json").read_text())["relative_changes"]
    assert set(changed) == {
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    }
    adapter = tmp_path / "adapter"
    assert main(["export-lora", str(tmp_path / "erased"), "--out", str(adapter)]) == 0
    assert all(name.startswith("transformer.") for name in read_lora(adapter))


def test_rates_of_every_method_and_attack(tmp_path):
    own = runs.RunSettings(model=str(tmp_path), concepts="concepts.yaml", attacks=("all",))
    rates = {attack.name: attack.learning_rate for attack in own.chosen_attacks()}
    assert max(rates.values()) == rates["textual_inversion"] == 5e-4
    assert rates["dreambooth"] == rates["reinitialised"] == 5e-6
    assert rates["dreambooth_lora"] == rates["locon"] == 1e-4
    digits = runs.RunSettings(attacks=("all",))
    assert digits.rates() is None
    assert {a.name: a for a in digits.chosen_attacks()} == dict(ATTACKS)
    for method in ("loss_ascent", "imma", "merge_only", "many_words"):
        own = runs.RunSettings(model=str(tmp_path), concepts="c.yaml", method=method)
        assert own.immunizer(0).learning_rate == 3e-5
        assert f"{method} learning_rate 3e-05" in own.rates()
    own = runs.RunSettings(model=str(tmp_path), concepts="c.yaml", method="erasure")
    assert own.rates() == "rates: lora learning_rate 0.0001; full_fine_tuning learning_rate 5e-06"


def test_config_files(tmp_path, monkeypatch):
    asked = []

    def note(settings, *_, **__):
        asked.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(runs, "run", note)
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: loss_ascent\nsettings: {steps: 3}\nattack-steps: 5\n"
        "attacks: lora\nattack_settings: {lora: {rank: 2}}\n"
    )
    assert main(["mima", "--config", str(file), "--lora.learning-rate", "1e-4"]) == 2
    (found,) = asked
    assert found.immunizer(4).seed == 4
    assert found.immunizer(4).steps == 3
    assert found.attack_steps == 5
    (lora,) = found.chosen_attacks()
    assert (lora.rank, lora.learning_rate) == (2, 1e-4)
    assert runs.RunSettings(attack_steps=2).steps_to_judge() == (0, 1, 2)
    words = ["--prompts", "rare_token", "unrelated_word"]
    assert main(["mima", "--config", str(file), *words]) == 2
    assert [a.name for a in asked[1].chosen_attacks()] == [
        "lora:rare_token",
        "lora:unrelated_word",
    ]
    # The yardstick meets the primary attacker alone.
    assert [a.name for a in asked[1].baseline().chosen_attacks()] == ["lora:rare_token"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"images": "x"}, "images must be an integer, got 'x'"),
        ({"seeds": ("1",)}, "seeds must be a list, each an integer"),
        ({"model": 3}, "model must be a text, got 3"),
        ({"erase": 1}, "erase must be true or false, got 1"),
        ({"method": "mimma"}, "method: mimma is no method; did you mean"),
        ({"attacks": ("lroa",)}, "attacks: lroa is no attack"),
        ({"prompts": ("canonical", "canonical")}, "prompts must be different wordings"),
    ],
)
def test_settings_built_in_python_are_checked_at_once(values, words):
    with pytest.raises(ValueError, match=r"must|no ") as caught:
        runs.RunSettings(**values)
    assert str(caught.value).startswith(words)
