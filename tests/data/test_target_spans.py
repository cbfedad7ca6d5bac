from samestep.data.target_spans import mask_from_offsets


def marks(offsets, spans, length) -> list[int]:
    return mask_from_offsets(offsets, spans, text_length=length).astype(int).tolist()


def test_a_token_across_the_start_is_a_target():
    assert marks([(0, 2), (2, 5), (5, 6)], [(3, 6)], 6) == [0, 1, 1]


def test_tokens_before_the_text_are_none_and_behind_it_follow_the_last_span():
    offsets = [(0, 0), (0, 2), (2, 4), (0, 0), (0, 0)]
    assert marks(offsets, [(2, 4)], 4) == [0, 0, 1, 1, 1]
    assert marks(offsets, [(0, 2)], 4) == [0, 1, 0, 0, 0]
    assert marks(offsets, [(4, 4)], 4) == [0, 0, 0, 1, 1]


def test_a_token_of_spaces_with_trimmed_offsets_counts():
    assert marks([(0, 2), (5, 5), (5, 7)], [(0, 5)], 7) == [1, 1, 0]
    assert marks([(0, 2), (5, 5), (5, 7)], [(5, 7)], 7) == [0, 0, 1]


def test_pieces_of_one_character_are_all_targets():
    assert marks([(0, 1), (1, 2), (1, 2), (1, 2)], [(1, 2)], 2) == [0, 1, 1, 1]


def test_no_tokens_and_no_spans():
    assert marks([], [(0, 1)], 1) == []
    assert marks([(0, 1)], [], 1) == [0]
