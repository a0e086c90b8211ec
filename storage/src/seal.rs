//! Secrets at rest: values sealed with a data key, the data key wrapped by somebody else.
//!
//! A stored value begins with a tag: 0 = as it is; 1 = sealed, followed by the number of the data
//! key and a `SealedValue` record. The column and the record's key are associated data, so a
//! sealed value cannot be moved to another key. The wrapped data keys lie in `meta`. When none
//! of them unwraps, a new one is made and the old ones stay: a wrap key that comes back finds
//! what it sealed. Until then those values read as missing.

use std::collections::BTreeMap;

use prost::Message as _;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};

use edgehub_proto::records::SealedValue;

use crate::error::{StoreError, WrapError};
use crate::layout::Cf;

const PLAIN: u8 = 0;
const SEALED: u8 = 1;
const SEALED_VERSION: u32 = 1;

/// Bytes of a data key.
const KEY_BYTES: usize = 32;

/// Who wraps the data key: the host's workload API, or a key of the connection string.
pub trait KeyWrap: Send + Sync {
    /// Wraps a data key.
    ///
    /// # Errors
    /// When the key service cannot be used.
    fn wrap(&self, data_key: &[u8]) -> Result<Vec<u8>, WrapError>;

    /// Unwraps what [`KeyWrap::wrap`] returned.
    ///
    /// # Errors
    /// When the wrap key is another one, the bytes are damaged or the service cannot be used.
    fn unwrap_key(&self, wrapped: &[u8]) -> Result<Vec<u8>, WrapError>;

    /// What it is, for log lines and to tell which wrapped keys are its own.
    fn kind(&self) -> &str;
}

/// Wraps with a key derived from the connection string's key (HKDF-SHA256, info
/// `edgehub-store-v1`; design.md section 5): the development form without a workload API.
pub struct ConnectionStringWrap {
    key: LessSafeKey,
}

const WRAP_INFO: &[u8] = b"edgehub-store-v1";

impl ConnectionStringWrap {
    /// `key` is the connection string's `SharedAccessKey`, in the same form at every start: another
    /// form is another key.
    #[must_use]
    #[expect(
        clippy::expect_used,
        reason = "32 bytes are below HKDF's limit of 255 times 32"
    )]
    pub fn new(key: &[u8]) -> Self {
        let derived = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(key);
        let okm = derived
            .expand(&[WRAP_INFO], &CHACHA20_POLY1305)
            .expect("a key of 32 bytes");
        Self {
            key: LessSafeKey::new(UnboundKey::from(okm)),
        }
    }
}

impl std::fmt::Debug for ConnectionStringWrap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectionStringWrap(***)")
    }
}

impl KeyWrap for ConnectionStringWrap {
    fn wrap(&self, data_key: &[u8]) -> Result<Vec<u8>, WrapError> {
        let sealed = encrypt(
            &self.key,
            &SystemRandom::new(),
            WRAP_INFO,
            data_key.to_vec(),
        );
        let (nonce, mut wrapped) =
            sealed.ok_or_else(|| WrapError::Unavailable("no random numbers".to_owned()))?;
        wrapped.splice(0..0, nonce);
        Ok(wrapped)
    }

    fn unwrap_key(&self, wrapped: &[u8]) -> Result<Vec<u8>, WrapError> {
        let (nonce, sealed) = wrapped
            .split_at_checked(NONCE_LEN)
            .ok_or(WrapError::Damaged)?;
        decrypt(&self.key, nonce, WRAP_INFO, sealed.to_vec()).ok_or(WrapError::WrongKey)
    }

    fn kind(&self) -> &'static str {
        "connection-string"
    }
}

/// Seals and opens values. Holds every data key that could be unwrapped.
pub(crate) struct Sealer {
    keys: BTreeMap<u32, LessSafeKey>,
    random: SystemRandom,
    /// Why there is no key to seal with, or why the newest stored one is unusable.
    problem: Option<WrapError>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer")
            .field("keys", &self.keys.len())
            .finish_non_exhaustive()
    }
}

impl Sealer {
    /// Unwraps the `stored` keys (number, record). Makes a new one when none can be used and
    /// returns it, to be stored before anything is sealed.
    pub(crate) fn open(
        stored: &[(u32, Vec<u8>)],
        wrap: &dyn KeyWrap,
    ) -> (Self, Option<(u32, Vec<u8>)>) {
        let mut sealer = Self {
            keys: BTreeMap::new(),
            random: SystemRandom::new(),
            problem: None,
        };
        for (number, record) in stored {
            // In ascending order, so that what remains is the newest key's problem.
            sealer.problem = match unwrap_record(record, wrap) {
                Ok(key) => {
                    sealer.keys.insert(*number, key);
                    None
                }
                Err(problem) => Some(problem),
            };
        }
        if !sealer.keys.is_empty() {
            return (sealer, None);
        }
        let number = stored
            .iter()
            .map(|(number, _)| number + 1)
            .max()
            .unwrap_or(0);
        match new_key(&sealer.random, wrap) {
            Ok((key, record)) => {
                sealer.keys.insert(number, key);
                (sealer, Some((number, record)))
            }
            Err(problem) => {
                sealer.problem = Some(problem);
                (sealer, None)
            }
        }
    }

    /// Why values sealed earlier cannot be read, or none can be sealed.
    pub(crate) fn problem(&self) -> Option<WrapError> {
        self.problem.clone()
    }

    /// The stored form of a value.
    pub(crate) fn seal(
        &self,
        cf: Cf,
        key: &[u8],
        value: Vec<u8>,
        sealed: bool,
    ) -> Result<Vec<u8>, StoreError> {
        if !sealed {
            let mut plain = value;
            plain.insert(0, PLAIN);
            return Ok(plain);
        }
        let missing = || {
            let none = WrapError::Unavailable("no data key".to_owned());
            StoreError::NoDataKey(self.problem.clone().unwrap_or(none))
        };
        let (number, data_key) = self.keys.last_key_value().ok_or_else(missing)?;
        let (nonce, ciphertext) =
            encrypt(data_key, &self.random, &place(cf, key), value).ok_or_else(missing)?;
        let record = SealedValue {
            version: SEALED_VERSION,
            nonce: nonce.to_vec().into(),
            ciphertext: ciphertext.into(),
        };
        let mut out = vec![SEALED];
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&record.encode_to_vec());
        Ok(out)
    }

    /// The value of a stored form; `None` when it is sealed and cannot be opened.
    pub(crate) fn open_value(
        &self,
        cf: Cf,
        key: &[u8],
        stored: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        match stored.split_first() {
            Some((&PLAIN, value)) => Ok(Some(value.to_vec())),
            Some((&SEALED, rest)) => Ok(self.unseal(cf, key, rest)),
            _ => Err(StoreError::Record { what: "value" }),
        }
    }

    fn unseal(&self, cf: Cf, key: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (number, record) = sealed.split_first_chunk::<4>()?;
        let data_key = self.keys.get(&u32::from_be_bytes(*number))?;
        let record = SealedValue::decode(record).ok()?;
        if record.version != SEALED_VERSION {
            return None;
        }
        decrypt(
            data_key,
            &record.nonce,
            &place(cf, key),
            record.ciphertext.to_vec(),
        )
    }
}

/// Associated data: where a value belongs.
fn place(cf: Cf, key: &[u8]) -> Vec<u8> {
    [cf.name().as_bytes(), &[0], key].concat()
}

/// Wrapped keys are stored as: length of the kind, kind, wrapped key.
fn unwrap_record(record: &[u8], wrap: &dyn KeyWrap) -> Result<LessSafeKey, WrapError> {
    let (length, rest) = record.split_first().ok_or(WrapError::Damaged)?;
    let (kind, wrapped) = rest
        .split_at_checked(usize::from(*length))
        .ok_or(WrapError::Damaged)?;
    if kind != wrap.kind().as_bytes() {
        return Err(WrapError::WrongKey);
    }
    let key = wrap.unwrap_key(wrapped)?;
    UnboundKey::new(&CHACHA20_POLY1305, &key)
        .map(LessSafeKey::new)
        .map_err(|_| WrapError::Damaged)
}

fn new_key(random: &SystemRandom, wrap: &dyn KeyWrap) -> Result<(LessSafeKey, Vec<u8>), WrapError> {
    let unavailable = |what: &str| WrapError::Unavailable(what.to_owned());
    let mut key = [0; KEY_BYTES];
    random
        .fill(&mut key)
        .map_err(|_| unavailable("no random numbers"))?;
    let kind = wrap.kind().as_bytes();
    let length = u8::try_from(kind.len()).map_err(|_| unavailable("kind too long"))?;
    let record = [[length].as_slice(), kind, &wrap.wrap(&key)?].concat();
    let key = UnboundKey::new(&CHACHA20_POLY1305, &key).map_err(|_| unavailable("key size"))?;
    Ok((LessSafeKey::new(key), record))
}

fn encrypt(
    key: &LessSafeKey,
    random: &SystemRandom,
    place: &[u8],
    mut value: Vec<u8>,
) -> Option<([u8; NONCE_LEN], Vec<u8>)> {
    let mut nonce = [0; NONCE_LEN];
    random.fill(&mut nonce).ok()?;
    let place = Aad::from(place);
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), place, &mut value)
        .ok()?;
    Some((nonce, value))
}

fn decrypt(key: &LessSafeKey, nonce: &[u8], place: &[u8], mut sealed: Vec<u8>) -> Option<Vec<u8>> {
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let length = key
        .open_in_place(nonce, Aad::from(place), &mut sealed)
        .ok()?
        .len();
    sealed.truncate(length);
    Some(sealed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(key: &[u8], stored: &[(u32, Vec<u8>)]) -> (Sealer, Option<(u32, Vec<u8>)>) {
        Sealer::open(stored, &ConnectionStringWrap::new(key))
    }

    #[test]
    fn a_sealed_value_comes_back_and_shows_nothing() {
        let (sealer, _) = sealer(b"key", &[]);
        let stored = sealer
            .seal(Cf::Scope, b"dev", b"secret".to_vec(), true)
            .unwrap();
        assert!(!stored.windows(6).any(|window| window == b"secret"));
        let again = sealer
            .seal(Cf::Scope, b"dev", b"secret".to_vec(), true)
            .unwrap();
        assert_ne!(stored, again, "nonces are random");
        let value = sealer.open_value(Cf::Scope, b"dev", &stored).unwrap();
        assert_eq!(value.as_deref(), Some(&b"secret"[..]));
    }

    #[test]
    fn a_sealed_value_belongs_to_its_column_and_key() {
        let (sealer, _) = sealer(b"key", &[]);
        let stored = sealer
            .seal(Cf::Scope, b"dev", b"secret".to_vec(), true)
            .unwrap();
        assert_eq!(
            sealer.open_value(Cf::Scope, b"dev2", &stored).unwrap(),
            None
        );
        assert_eq!(sealer.open_value(Cf::Twins, b"dev", &stored).unwrap(), None);
        for index in 1..stored.len() {
            let mut changed = stored.clone();
            changed[index] ^= 1;
            let value = sealer.open_value(Cf::Scope, b"dev", &changed).unwrap();
            assert_ne!(value.as_deref(), Some(&b"secrets"[..]));
        }
        assert!(sealer.open_value(Cf::Scope, b"dev", b"").is_err());
        assert_eq!(
            sealer.open_value(Cf::Scope, b"dev", &[SEALED, 0]).unwrap(),
            None
        );
    }

    #[test]
    fn another_wrap_key_reads_nothing_and_breaks_nothing() {
        let (first, stored) = sealer(b"key", &[]);
        let sealed = first
            .seal(Cf::Scope, b"dev", b"secret".to_vec(), true)
            .unwrap();
        assert_eq!(first.problem(), None);
        let mut keys = vec![stored.unwrap()];

        let (other, new) = sealer(b"other", &keys);
        assert_eq!(other.problem(), Some(WrapError::WrongKey));
        assert_eq!(other.open_value(Cf::Scope, b"dev", &sealed).unwrap(), None);
        let theirs = other
            .seal(Cf::Scope, b"dev", b"new".to_vec(), true)
            .unwrap();
        keys.push(new.unwrap());
        assert_eq!(keys[1].0, 1);

        let (back, none) = sealer(b"key", &keys);
        assert!(none.is_none());
        assert_eq!(
            back.problem(),
            Some(WrapError::WrongKey),
            "the newest key is not ours"
        );
        assert!(
            back.open_value(Cf::Scope, b"dev", &sealed)
                .unwrap()
                .is_some()
        );
        assert_eq!(back.open_value(Cf::Scope, b"dev", &theirs).unwrap(), None);
    }

    #[test]
    fn damaged_keys_and_an_unreachable_service_are_told_apart() {
        struct Unreachable;
        impl KeyWrap for Unreachable {
            fn wrap(&self, _: &[u8]) -> Result<Vec<u8>, WrapError> {
                Err(WrapError::Unavailable("refused".into()))
            }
            fn unwrap_key(&self, _: &[u8]) -> Result<Vec<u8>, WrapError> {
                Err(WrapError::Unavailable("refused".into()))
            }
            fn kind(&self) -> &'static str {
                "test"
            }
        }
        let (sealer, new) = Sealer::open(&[(0, vec![4, b't', b'e', b's', b't'])], &Unreachable);
        assert!(new.is_none());
        let refused = sealer.seal(Cf::Scope, b"k", b"v".to_vec(), true);
        assert!(matches!(
            refused,
            Err(StoreError::NoDataKey(WrapError::Unavailable(_)))
        ));
        assert!(sealer.seal(Cf::Twins, b"k", b"v".to_vec(), false).is_ok());
        let (damaged, _) = Sealer::open(&[(0, vec![9, 1])], &Unreachable);
        assert!(damaged.problem().is_some());
        let wrap = ConnectionStringWrap::new(b"key");
        assert_eq!(wrap.unwrap_key(b"short"), Err(WrapError::Damaged));
        assert_eq!(wrap.unwrap_key(&[0; 60]), Err(WrapError::WrongKey));
        assert_eq!(format!("{wrap:?}"), "ConnectionStringWrap(***)");
    }
}
