"""Faults of the halo variant of conv3x3: what is altered in its source, by what that makes wrong."""

from __future__ import annotations

from gluon_source import Edit

FREE_PIXELS = "mbarrier.arrive(pixels_empty.index((step + SLOTS - 1) % SLOTS))"
HAND_OVER = "mbarrier.arrive(turns.index(1 - NUMBER))"
MASK = "mbarrier.wait(mask_full.index(NUMBER)"
TURN = "mbarrier.wait(turns.index(NUMBER)"
LAST_WAIT = "        acc = warpgroup_mma_wait(0, deps=(acc,))\n"
FAULTS: dict[str, list[Edit]] = {
    "the producer waits for the wrong phase of pixels": [("((step // SLOTS) & 1) ^ 1", "(step // SLOTS) & 1")],
    "the producer waits for the wrong phase of weights": [
        ("((tap_step // WEIGHT_SLOTS) & 1) ^ 1", "(tap_step // WEIGHT_SLOTS) & 1")
    ],
    "a consumer waits for the wrong phase of pixels": [
        ("pixels_full.index(slot), (step // SLOTS) & 1)", "pixels_full.index(slot), ((step // SLOTS) & 1) ^ 1)")
    ],
    "a consumer does not wait for weights": [
        ("mbarrier.wait(weights_full.index(tap_slot), (tap_step // WEIGHT_SLOTS) & 1)", "pass")
    ],
    "weights freed a product early": [("last = (tap_step + WEIGHT_SLOTS - 1) % WEIGHT_SLOTS", "last = tap_slot")],
    "pixels freed a column early": [
        ("pixels_empty.index((step + SLOTS - 1) % SLOTS), pred=i > 0", "pixels_empty.index(slot), pred=i > 0")
    ],
    "one product too many in flight": [("warpgroup_mma_wait(1", "warpgroup_mma_wait(2")],
    "sums used before they are complete": [(LAST_WAIT, LAST_WAIT.replace("(0", "(1"))],
    "the last slots freed before the products have ended": [
        (LAST_WAIT, ""),
        (f"        {FREE_PIXELS}\n        step", f"        {FREE_PIXELS}\n{LAST_WAIT}        step"),
    ],
    "the last pixels never freed": [(f"        {FREE_PIXELS}\n        step", "        step")],
    "the last weights freed twice": [("pred=i + kh > 0", "pred=step + kh > 0")],
    "staging memory rewritten": [("            tma.store_wait(0)  # Of the tile before, from the same memory.\n", "")],
    "staging memory rewritten while the second copy reads it": [
        ("            tma.store_wait(0)  # Of", "            tma.store_wait(1)  # Of")
    ],
    "no fence before the copy": [("            fence_async_shared()\n            box", "            box")],
    "barriers of pixels with an arrival for each warpgroup, of whatever tile": [
        ("mbarrier.init(pixels_empty.index(i), count=PARTS)", "mbarrier.init(pixels_empty.index(i), count=2)")
    ],
    "a barrier of pixels with one arrival": [
        ("mbarrier.init(pixels_empty.index(i), count=PARTS)", "mbarrier.init(pixels_empty.index(i), count=1)")
    ],
    "a barrier of weights with an arrival too many": [
        ("mbarrier.init(weights_empty.index(i), count=PARTS)", "mbarrier.init(weights_empty.index(i), count=PARTS + 1)")
    ],
    "a barrier of weights with one arrival": [
        ("mbarrier.init(weights_empty.index(i), count=PARTS)", "mbarrier.init(weights_empty.index(i), count=1)")
    ],
    "nobody waits for its turn": [(f"{TURN}, (turn & 1) ^ (1 - NUMBER))", "pass")],
    "a turn's wrong phase": [("(turn & 1) ^ (1 - NUMBER)", "(turn & 1) ^ NUMBER")],
    "a turn's phase that stays": [("        turn += 1\n", "")],
    "both may begin": [(f"{TURN}, (turn & 1) ^ (1 - NUMBER)", f"{TURN}, (turn & 1) ^ 1")],
    "the turn never handed over": [(HAND_OVER, "pass")],
    "the turn handed to oneself": [(HAND_OVER, "mbarrier.arrive(turns.index(NUMBER))")],
    "the turn handed over before the products": [
        (HAND_OVER, "pass"),
        (
            "(1 - NUMBER))\n        for i",
            f"(1 - NUMBER))\n            {HAND_OVER}\n        for i",
        ),
    ],
    "the other's steps not passed over": [("        step += (EVERY - 1) * columns\n", "")],
    "the second warpgroup's steps counted from the first's": [("step = FIRST * columns", "step = 0")],
    "both take every tile": [("EVERY: gl.constexpr = 2 // PARTS", "EVERY: gl.constexpr = 1")],
    "both take the same tiles": [("gl.program_id(0) + FIRST * gl.num_programs(0)", "gl.program_id(0)")],
    "both store the same channels": [("        n0 += PART * _CHANNELS\n", "")],
    "both read the same weights": [("tap_slot * PARTS + PART", "tap_slot * PARTS")],
    "half of the weights loaded past their slot": [
        ("weights.index(tap_slot * (BLOCK_N // _CHANNELS))", "weights.index(tap_slot)")
    ],
    "too few bytes expected": [("(TILE_H + 2) * _TILE_W * _BLOCK_K * 2)", "TILE_H * _TILE_W * _BLOCK_K * 2)")],
    "too many bytes expected": [
        ("mbarrier.expect(full, BLOCK_N * _BLOCK_K * 2)", "mbarrier.expect(full, BLOCK_N * 256)")
    ],
    "the border one row too low": [("h0 - 1, w0 + kw - 1, k, full, k < C1", "h0, w0 + kw - 1, k, full, k < C1")],
    "the lower box one row too low": [("[image, h + TILE_H, w, k]", "[image, h + TILE_H + 1, w, k]")],
    "the second input's channels counted from the first's": [("k - C1, full", "k, full")],
    "a mask read before it has come": [(f"{MASK}, turn & 1)", "pass")],
    "a mask's wrong phase": [(f"{MASK}, turn & 1)", f"{MASK}, (turn & 1) ^ 1)")],
    "a mask's phase that stays": [(f"{MASK}, turn & 1)", f"{MASK}, 0)")],
    "a mask fetched over what is being stored": [
        ("            tma.store_wait(0)  # Before the mask", "            pass  #")
    ],
    "too many bytes of a mask expected": [("PIXELS * _CHANNELS * 2)", "PIXELS * BLOCK_N * 2)")],
    "the other's barrier of a mask": [
        ("h0, w0, n0], mask_full.index(NUMBER), box)", "h0, w0, n0], mask_full.index(1 - NUMBER), box)")
    ],
    "the other's place for a mask": [
        ("mask = y_stage.index(NUMBER)", "mask = y_stage.index(1 - NUMBER)"),
    ],
    "a mask of other channels": [("(mask_desc, [image, h0, w0, n0]", "(mask_desc, [image, h0, w0, 0]")],
    "a mask of other pixels": [("(mask_desc, [image, h0, w0, n0]", "(mask_desc, [image, h0 - 1, w0, n0]")],
    "the gradient passed where it is not": [("y <= 0.0, 0.0, g", "y > 0.0, 0.0, g")],
    "a slope where there is none": [("y > 0.0, g, g * negative_slope", "y <= 0.0, g, g * negative_slope")],
    "statistics of what is outside the image": [("gl.expand_dims(inside, 0), v - ", "True, v - ")],
    "a mean without what it is taken about": [("pivot + step", "step")],
    "squares that are not about the mean": [(" - count * step * step", "")],
    "statistics that divide by whole tiles": [("gl.minimum(TILE_H, H - h0)", "TILE_H")],
    "statistics that divide by whole rows": [("gl.minimum(_TILE_W, W - w0)", "_TILE_W")],
    "statistics by tiles and blocks of channels": [("tile // blocks_n, tiles", "tile, tiles")],
    "squares among the means": [("(tiles + tile) * COUT", "(tile + 1) * COUT")],
    "statistics of channels past the last": [("+ n, m2, mask=n < COUT)", "+ n, m2)")],
    "a count from every block of channels": [("W, n0 == 0,", "W, True,")],
    "both count": [("H, W, n0 == 0,", "H, W, n0 < _CHANNELS * PARTS,")],
    "a column for a row": [("(kh * 3 + kw) * channels", "(kw * 3 + kh) * channels")],
    "every program takes every tile": [
        ("range(gl.program_id(0), tiles, gl.num_programs(0))", "range(0, tiles, 1)"),
        (
            "range(gl.program_id(0) + FIRST * gl.num_programs(0), tiles, EVERY * gl.num_programs(0))",
            "range(FIRST, tiles, EVERY)",
        ),
    ],
}
