"""Results in every state, written by the writers of the package."""

HOSTILE = "<script>window.hacked=1</script>"


def write_sweep(folder, cells=36, strengths=(0.0, 0.5, 1.0), images=True):
    """A sweep as `pysteer sweep images` leaves it, written through its own store."""
    import torch

    from pysteer.sweep.rows import table_of
    from pysteer.sweep.store import Store

    store = Store(folder)
    store.create({"task": "images", "base": {"seed": 0}, "axes": {"strength": list(strengths)}})
    pixels = [torch.full((64, 64, 3), 40, dtype=torch.uint8) for _ in strengths]
    for i, image in enumerate(pixels):
        image[8 : 24 + 8 * i, 8:40, i % 3] = 220
    names = store.put_images(pixels) if images else ["0" * 32] * len(pixels)
    per = len(strengths) * 2
    rows = []
    for i in range(cells):
        level, method = i % len(strengths), ("prototype", "mean_difference")[i // len(strengths) % 2]
        rows.append({
            "key": f"{i:032x}", "status": "ok", "image": names[level], "prompt": f"prompt {i // per} {HOSTILE}",
            "method": method, "strength": strengths[level], "seed": i // per % 50, "target": level >= 1 + (i % 4 == 0),
            "change": 0.01 * level, "kept": level < 2 or i % 3 > 0, "seconds": 0.1,
        })  # fmt: skip
    kinds = {"key": "string", "strength": "double", "change": "double"}
    half = len(rows) // 2
    store.write("w0", table_of(rows[:half], kinds))
    store.write("w1", table_of(rows[half:], kinds))
    return store


def write_features(folder):
    """A representation of features, written by its own writer."""
    import io

    import torch
    from PIL import Image

    from pysteer.dream.representation import FEATURES, IMAGES, INDEX, PROFILES, RepresentationWriter

    def png(level):
        out = io.BytesIO()
        Image.new("RGB", (32, 32), (level, 80, 160)).save(out, "png")
        return out.getvalue()

    class Found:
        kind = "raw"
        timesteps = torch.tensor([1.0, 250.0, 500.0, 750.0])
        frequency = torch.rand(6, 4)
        mean = torch.rand(6, 4)
        most = torch.rand(6, 4)

    writer = RepresentationWriter(folder)
    for kind in ("raw", "sae"):
        Found.kind = kind
        writer.add_features(Found, [
            {"feature": i, "live": i < 5, "activity": float(i), "mean": 0.1, "largest": 2.0 + i, "peaks": [250, 750],
             "peak_heights": [0.5, 0.6], "intervals": [[1.0, 750.0]], "label": ["colour=red", "shape=ring"][i % 2],
             "area": 0.5 + 0.05 * i} for i in range(6)
        ])  # fmt: skip
    for i in range(3):
        common = {"kind": "raw", "feature": i}
        writer.add_image(png(10 + i), role="prior", seed=1, value=2.0, timestep=-1.0, **common)
        for t in (250.0, 750.0):
            figures = {"activation": 0.5, "loss": 0.1}
            for step in (0, 10):
                writer.add_image(png(30 + step + i), role="snapshot", variant="noise", timestep=t, seed=1, step=step,
                                 figures=figures, **common)  # fmt: skip
            writer.add_image(png(90 + i), role="dream", variant="noise", timestep=t, seed=1, step=20, cover=True,
                             figures=figures, **common)  # fmt: skip
            writer.add_image(png(200 + i), role="example", timestep=t, rank=0, value=3.0, text=f"a ring {HOSTILE}",
                             map=[0.0, 1.0, 0.2, 0.5], **common)  # fmt: skip
    writer.finish({"model": "test", "site": "mid.0"})
    assert all((folder / name).is_file() for name in (FEATURES, PROFILES, IMAGES, INDEX))


def write_run(folder, recipe, config, summary=None):
    """A run folder with its marker, and a summary where it finished."""
    from pysteer import files

    files.write_json(folder / "run.json", {"recipe": recipe, "pysteer": "0.1.0", "config": config})
    if summary is not None:
        files.write_json(folder / "summary.json", {"recipe": recipe, "config_hash": "0123456789abcdef", **summary})


def write_training(folder):
    """A training with a channel history, as vae-dynamics leaves it."""
    import torch

    from pysteer import files
    from pysteer.dynamics.history import History
    from pysteer.dynamics.window import Window

    history = History(folder / "channel_history")
    for step in (5, 10, 15):
        moments = torch.rand(8, 4, dtype=torch.float64) + step
        moments[0] = 64.0  # the count
        history.add(Window(step, "train", ["norm1.output"], [4], moments, {}))
    history.flush()
    files.write_text(folder / "training_log.csv", "step,loss\n5,1.0\n10,0.5\n15,0.25\n")
    files.write_text(folder / "intervention_history.csv", "step,inactive,nudged\n5,3,3\n10,1,1\n")
    files.write_text(folder / "nudges.csv", "step,parameter,channel,before,after\n5,norm1.weight,1,0.0,0.05\n")


def write_adapters(folder):
    """Rows of adapters with their index, as weightspace leaves them."""
    import numpy as np

    from pysteer import files

    rows = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    rows[4:] += 3
    files.write_bytes(folder / "rows" / "rows.f32", rows.tobytes())
    entries = [{"path": f"c/{i}.safetensors", "label": f"shape={'ring' if i > 3 else 'star'}"} for i in range(8)]
    files.write_json(folder / "rows" / "index.json", {"version": 1, "entries": entries})


def write_results(root):
    """Everything above, and runs that are broken in each way."""
    from pysteer import files

    write_sweep(root / "sweep")
    write_run(root / "dream", "dream", {"seed": 1}, {"best": {"target_rate": 0.5}, "tables": {}})
    write_features(root / "dream" / "representation")
    write_run(root / "vae", "vae-dynamics", {"seed": 2}, {"best": {"mse": 0.25}})
    write_training(root / "vae" / "runs" / "baseline-seed1")
    write_run(root / "weights", "weightspace", {"seed": 3}, {"best": {"accuracy": 0.75}})
    write_adapters(root / "weights")
    doses = [{"method": "prototype", "strength": s, "target_rate": {"value": s / 2, "low": s / 3, "high": s / 2 + 0.1},
              "feature_distance": s} for s in (0.0, 1.0, 2.0)]  # fmt: skip
    write_run(root / "doses", "act-image", {"seed": 4, "name": HOSTILE}, {"best": {"strength": 2.0},
              "seconds": 12.0, "tables": {"methods": doses}})  # fmt: skip
    files.write_text(root / "doses" / "report.html", "<!doctype html><title>report</title>")
    write_run(root / "waiting", "methods", {"seed": 5})
    files.write_text(root / "broken" / "run.json", "{ not json")
    write_run(root / "half", "methods", {"seed": 6})
    files.write_text(root / "half" / "summary.json", '{"best": {')
    files.write_bytes(root / "doses" / "metrics.parquet", b"PAR1 and nothing more")
    (root / "empty").mkdir()
    return root
