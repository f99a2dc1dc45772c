//! Which slot a prompt gets, and how much of it is there already.

use tabagent_model::context::Slots;

/// Slots that were used one after the other for these tokens.
fn filled<const N: usize>(contents: [&[i32]; N]) -> Slots {
    let mut slots = Slots::new(N);
    let mut taken: Vec<(usize, &[i32])> = Vec::new();
    for tokens in contents {
        let (slot, cached) = slots.try_reserve(&[-1]).expect("one is free");
        assert_eq!(cached, 0);
        taken.push((slot, tokens));
    }
    for (slot, tokens) in taken {
        slots.release(slot, tokens);
    }
    slots
}

/// The slot that `tokens` alone would find, without keeping it.
fn holder(slots: &mut Slots, tokens: &[i32]) -> usize {
    let (slot, cached) = slots.try_reserve(&[tokens, &[-1]].concat()).expect("one is free");
    assert_eq!(cached, tokens.len());
    slots.release(slot, tokens);
    slot
}

#[test]
fn each_slot_is_given_once_until_it_comes_back() {
    let mut slots = Slots::new(3);
    assert_eq!((slots.len(), slots.is_empty(), slots.num_busy()), (3, false, 0));
    let mut given: Vec<usize> = (0..3).map(|_| slots.try_reserve(&[1]).unwrap().0).collect();
    assert_eq!((slots.try_reserve(&[1]), slots.num_busy()), (None, 3));
    given.sort_unstable();
    assert_eq!(given, [0, 1, 2]);
    slots.release(1, &[1]);
    assert_eq!((slots.try_reserve(&[1]), slots.num_busy()), (Some((1, 0)), 3));
}

#[test]
fn no_slots_means_none_to_give() {
    let mut slots = Slots::new(0);
    assert_eq!((slots.try_reserve(&[1]), slots.is_empty()), (None, true));
}

#[test]
fn a_conversation_finds_its_slot_again() {
    let mut slots = filled([&[1, 2, 3, 4], &[1, 2, 9, 9], &[7, 8]]);
    let second = holder(&mut slots, &[1, 2, 9, 9]);
    assert_eq!(slots.try_reserve(&[1, 2, 9, 9, 5, 6]), Some((second, 4)));
}

#[test]
fn the_last_prompt_token_is_never_taken_from_the_cache() {
    for (prompt, cached) in [(&[1, 2, 3, 4][..], 3), (&[1, 2], 1), (&[1], 0), (&[], 0)] {
        let mut slots = filled([&[1, 2, 3, 4]]);
        assert_eq!(slots.try_reserve(prompt), Some((0, cached)), "{prompt:?}");
    }
}

#[test]
fn what_is_behind_the_shared_beginning_is_gone() {
    let mut slots = filled([&[1, 2, 3, 4]]);
    assert_eq!(slots.try_reserve(&[1, 2, 9]), Some((0, 2)));
    // It is given back without anything computed.
    slots.release(0, &[1, 2]);
    assert_eq!(slots.try_reserve(&[1, 2, 3, 4, 5]), Some((0, 2)));
}

#[test]
fn a_short_accidental_overlap_takes_no_long_conversation() {
    let long: Vec<i32> = (0..50).collect();
    let mut slots = filled([&long, &[]]);
    let kept = holder(&mut slots, &long);
    let (other, cached) = slots.try_reserve(&[0, 70, 71]).unwrap();
    assert_eq!((other != kept, cached), (true, 0));
    // Where there is nothing else, the little that is shared is used.
    assert_eq!(slots.try_reserve(&[0, 70, 71]), Some((kept, 1)));
}

#[test]
fn a_slot_that_was_emptied_goes_before_one_that_has_idled_longer() {
    let mut slots = filled([&[1, 2, 3], &[7, 8]]);
    let idle = holder(&mut slots, &[1, 2, 3]);
    let (emptied, _) = slots.try_reserve(&[7, 8, 9]).unwrap();
    slots.release(emptied, &[]);
    let (taken, _) = slots.try_reserve(&[5, 6]).unwrap();
    assert_eq!((taken, taken != idle), (emptied, true));
}

#[test]
fn an_unused_slot_goes_before_one_that_holds_something_else() {
    let mut slots = Slots::new(2);
    let (first, _) = slots.try_reserve(&[1]).unwrap();
    slots.release(first, &[1, 2, 3]);
    let (second, cached) = slots.try_reserve(&[7, 8]).unwrap();
    assert_eq!((second != first, cached), (true, 0));
}

#[test]
fn without_overlap_the_longest_idle_is_overwritten() {
    let mut slots = filled([&[1, 1], &[2, 2], &[3, 3]]);
    let order =
        [holder(&mut slots, &[2, 2]), holder(&mut slots, &[1, 1]), holder(&mut slots, &[3, 3])];
    let overwritten = [8, 8, 8].map(|token| slots.try_reserve(&[token, token]).unwrap());
    assert_eq!(overwritten, order.map(|slot| (slot, 0)));
}

#[test]
fn of_two_overlaps_the_longer_one_is_taken() {
    let mut slots = filled([&[1, 2, 3], &[1, 2, 3, 4, 5]]);
    let longer = holder(&mut slots, &[1, 2, 3, 4, 5]);
    holder(&mut slots, &[1, 2, 3]);
    assert_eq!(slots.try_reserve(&[1, 2, 3, 4, 5, 6]), Some((longer, 5)));
}

#[test]
fn a_busy_slot_shares_nothing() {
    let mut slots = filled([&[1, 2, 3, 4], &[]]);
    let (busy, _) = slots.try_reserve(&[1, 2, 3, 4, 5]).unwrap();
    let (other, cached) = slots.try_reserve(&[1, 2, 3, 4, 5]).unwrap();
    assert_eq!((other != busy, cached), (true, 0));
}

#[test]
fn idle_slots_can_be_forgotten_and_busy_ones_cannot() {
    let mut slots = filled([&[1, 2], &[3, 4], &[]]);
    let (busy, _) = slots.try_reserve(&[1, 2, 9]).unwrap();
    let idle = holder(&mut slots, &[3, 4]);
    assert_ne!(busy, idle);
    assert_eq!(slots.forget_idle(), [idle]);
    assert_eq!(slots.forget_idle(), [0; 0]);
    assert_eq!(slots.try_reserve(&[3, 4, 5]).map(|(_, cached)| cached), Some(0));
}

#[test]
fn everything_can_be_forgotten() {
    let mut slots = filled([&[1, 2], &[3, 4]]);
    let (busy, _) = slots.try_reserve(&[1, 2, 9]).unwrap();
    slots.forget_all();
    assert_eq!((slots.num_busy(), slots.forget_idle()), (1, vec![]));
    assert_eq!(slots.try_reserve(&[3, 4, 5]).map(|(_, cached)| cached), Some(0));
    slots.release(busy, &[1, 2, 9]);
    assert_eq!(slots.try_reserve(&[1, 2, 9, 9]), Some((busy, 3)));
}

#[test]
fn the_slot_that_shares_most_is_found_busy_or_not() {
    let mut slots = filled([&[1, 2, 3], &[1, 2, 3, 4, 5], &[7]]);
    slots.try_reserve(&[1, 2, 3, 4, 5, 6]).unwrap();
    let (source, shared) = slots.find_shared(&[1, 2, 3, 4, 9], 0).unwrap();
    assert_eq!(shared, 4);
    assert_eq!(slots.find_shared(&[1, 2, 3, 4, 9], 3), Some((source, 4)));
    assert_eq!(slots.find_shared(&[1, 2, 3, 4, 9], 4), None);
    // The last token of a prompt is always computed.
    assert_eq!(slots.find_shared(&[1, 2, 3, 4], 0).map(|(_, shared)| shared), Some(3));
    assert_eq!(slots.find_shared(&[8], 0), None);
}

#[test]
fn what_a_busy_slot_holds_by_now_can_be_shared() {
    let mut slots = Slots::new(2);
    let (busy, _) = slots.try_reserve(&[1, 2, 3]).unwrap();
    assert_eq!(slots.find_shared(&[1, 2, 3], 0), None);
    slots.hold(busy, &[1, 2, 3]);
    assert_eq!(slots.find_shared(&[1, 2, 3], 0), Some((busy, 2)));
}
