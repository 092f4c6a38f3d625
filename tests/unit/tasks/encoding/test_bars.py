"""A run writes its own progress to the terminal, without the progress bars of libraries that load weights."""

from __future__ import annotations

from tasks.encoding.text import chat


def test_reading_and_writing_weights_draws_no_bar_and_other_bars_stay(tmp_path, capsys):
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm

    from tasks.encoding.config import TinyTextEncoderConfig
    from tasks.encoding.small.text_encoder import build_text_encoder
    from tasks.encoding.small.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([], 64)
    config = TinyTextEncoderConfig(hidden_size=48, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    model = build_text_encoder(config, tokenizer, 0)
    chat.hide_bars()
    model.save_pretrained(tmp_path)
    chat.load_text_encoder(tmp_path)
    assert "%|" not in capsys.readouterr().err
    list(tqdm(range(3), desc="ours"))
    assert "ours: 100%|" in capsys.readouterr().err and not are_progress_bars_disabled()
