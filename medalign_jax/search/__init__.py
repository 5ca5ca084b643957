"""Search by words and by example: `common_space` compares sounds with texts, `index` sounds with
sounds; `files` are the recordings that commands name."""
