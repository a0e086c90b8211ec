//! Ids that the hub makes up.

use ring::rand::{SecureRandom, SystemRandom};

/// A random UUID.
pub(crate) fn uuid_bytes() -> [u8; 16] {
    let mut bytes = [0_u8; 16];
    // A system without randomness has no use for an emulator; equal ids would only fail tests.
    let _ = SystemRandom::new().fill(&mut bytes);
    let number = u128::from_be_bytes(bytes);
    // Version 4, variant 1.
    (number & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62).to_be_bytes()
}

/// A random UUID, lower case with dashes.
pub(crate) fn uuid() -> String {
    uuid_text(uuid_bytes())
}

/// A UUID's text, lower case with dashes.
pub(crate) fn uuid_text(bytes: [u8; 16]) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)];
    let parts = parts.map(|(from, to)| hex.get(from..to).unwrap_or_default());
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_have_their_form_and_differ() {
        let id = uuid();
        let lengths: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(id.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&id.as_bytes()[19]), "{id}");
        assert_ne!(id, uuid());
    }
}
