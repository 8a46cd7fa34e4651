"""Named model sizes: the released models, the growth chains of the paper and of the release, and small ones."""

# Name: layers, hidden size, heads, tokens in each of q, k, v and proj, feed-forward tokens, sequence length
NAMED_SIZES = {
  # For CPUs and tests.
  "tiny": (2, 64, 4, 64, 256, 128),
  "mini": (4, 128, 4, 128, 512, 128),
  "small": (4, 256, 4, 256, 1024, 256),
  # The released Pile models.
  "150m": (12, 768, 12, 768, 3072, 2048),
  "450m": (24, 1024, 16, 1024, 4096, 2048),
  "900m": (32, 1280, 16, 1280, 5120, 2048),
  "1.5b": (40, 1536, 16, 1536, 6144, 2048),
  # Continues them; nobody has released one. Its counts divide by every mesh of 2^k chips.
  "7b": (26, 4096, 32, 4096, 16384, 2048),
  # The paper's growth chain on OpenWebText (Table 9); it prints the last as 1.4B.
  "124m": (12, 768, 12, 576, 2304, 1024),
  "354m": (12, 768, 12, 2140, 8560, 1024),
  "757m": (12, 768, 12, 4850, 19400, 1024),
  "1.3b": (12, 768, 12, 8620, 34480, 1024),
  # The released growth chain on OpenWebText2: deeper and wider models than the paper's.
  "owt2-354m": (24, 1024, 16, 768, 3072, 1024),
  "owt2-757m": (24, 1024, 16, 1792, 7168, 1024),
}
