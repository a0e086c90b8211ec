use super::*;

/// flow: next-incoming-id 0, incoming-window 5000, next-outgoing-id 1, outgoing-window 5000,
/// handle 0, delivery-count 0, link-credit 3; as short as the standard allows.
const FLOW: &[u8] = b"\x00\x00\x00\x1d\x02\x00\x00\x00\x00\x53\x13\xc0\x10\x07\
    \x43\x70\x00\x00\x13\x88\x52\x01\x70\x00\x00\x13\x88\x43\x43\x52\x03";
/// disposition of the receiver: 0 to 1, settled, accepted.
const ACCEPTED: &[u8] =
    b"\x00\x00\x00\x17\x02\x00\x00\x00\x00\x53\x15\xc0\x0a\x05\x41\x43\x52\x01\x41\x00\x53\x24\x45";

fn sized(frame: &[u8]) -> Vec<u8> {
    let size = length(frame.len());
    let rest = frame.get(4..).unwrap_or_default();
    [&size[..], rest].concat()
}

fn sender(window: u16) -> Sender {
    let mut sender = Sender::new(3, window);
    let flow = sized(FLOW);
    assert_eq!(sender.take(&flow, &mut |_| {}).unwrap(), flow.len());
    sender
}

#[test]
fn a_transfer_has_the_bytes_of_the_standard() {
    let mut out = Vec::new();
    let mut sender = sender(1);
    sender.next = 0x0102_0304;
    sender.credit_until = u32::MAX;
    sender.window_until = u32::MAX;
    sender.fill(Instant::now(), &mut out).unwrap();
    let wanted =
        b"\x00\x00\x00\x37\x02\x00\x00\x00\x00\x53\x14\xd0\x00\x00\x00\x1a\x00\x00\x00\x05\
        \x70\x00\x00\x00\x00\x70\x01\x02\x03\x04\xa0\x04\x01\x02\x03\x04\x70\x00\x00\x00\x00\x42\
        \x00\x53\x75\xa0\x03\x00\x07\x0e";
    assert_eq!(out, sized(wanted));
}

#[test]
fn credit_and_window_are_kept_to() {
    let now = Instant::now();
    let mut out = Vec::new();
    let mut by_credit = sender(10);
    by_credit.fill(now, &mut out).unwrap();
    assert_eq!((by_credit.in_flight(), by_credit.next), (3, 3));

    let mut by_window = sender(2);
    by_window.fill(now, &mut out).unwrap();
    assert_eq!(by_window.in_flight(), 2);
    // Two are settled, and with the first flow's credit only one more may go.
    let (mut settled, answer) = (0, sized(ACCEPTED));
    for cut in 0..answer.len() {
        let part = answer.get(..cut).unwrap();
        assert_eq!(by_window.take(part, &mut |_| {}).unwrap(), 0);
    }
    let used = by_window.take(&answer, &mut |_| settled += 1).unwrap();
    assert_eq!((used, settled), (answer.len(), 2));
    assert_eq!(by_window.in_flight(), 0);
    by_window.fill(now, &mut out).unwrap();
    assert_eq!(by_window.in_flight(), 1);
    assert_eq!((by_window.first, by_window.sent.len()), (2, 1));
}

#[test]
fn what_was_not_sent_or_is_settled_or_refused_is_an_error() {
    let answer = sized(ACCEPTED);
    assert!(sender(2).take(&answer, &mut |_| {}).is_err(), "not sent");
    let mut twice = sender(2);
    twice.fill(Instant::now(), &mut Vec::new()).unwrap();
    twice.take(&answer, &mut |_| {}).unwrap();
    assert!(twice.take(&answer, &mut |_| {}).is_err(), "twice");
    let mut refused = sender(2);
    refused.fill(Instant::now(), &mut Vec::new()).unwrap();
    let mut rejected = answer;
    let code = rejected.iter().rposition(|byte| *byte == 0x24).unwrap();
    *rejected.get_mut(code).unwrap() = 0x25;
    assert!(refused.take(&rejected, &mut |_| {}).is_err(), "rejected");
    let detach = frame(0, &described(0x16, &list(&[uint(0)])));
    assert!(refused.take(&detach, &mut |_| {}).is_err(), "detached");
}

#[test]
fn heartbeats_and_fields_of_every_kind_are_passed_over() {
    assert_eq!(sender(1).take(&frame(0, &[]), &mut |_| {}).unwrap(), 8);
    let fields = [
        string("text"),
        binary(&[7; 300]),
        vec![0x40],
        [&[0x98][..], &[1; 16]].concat(),
        list(&[uint(1), uint(2)]),
        vec![0x80, 0, 0, 0, 0, 0, 0, 1, 0],
    ];
    let frame = frame(0, &described(code::OPEN, &list(&fields)));
    let parsed = Frame::parse(frame.get(4..).unwrap()).unwrap();
    assert_eq!(parsed.numbers, [None, None, None, None, None, Some(256)]);
    assert!(Frame::parse(&[1, 0, 0, 0]).is_err(), "a data offset");
    assert!(Frame::parse(&[2, 0, 0, 0, 0, 0x53, 0x10, 0xc0, 9, 1, 0x70, 1]).is_err());
}
