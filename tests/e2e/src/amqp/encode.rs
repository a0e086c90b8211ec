//! Frames and messages, written value by value.

use super::code;

/// null.
#[must_use]
pub fn null() -> Vec<u8> {
    vec![0x40]
}

/// A boolean.
#[must_use]
pub fn boolean(value: bool) -> Vec<u8> {
    vec![if value { 0x41 } else { 0x42 }]
}

/// A ubyte.
#[must_use]
pub fn ubyte(value: u8) -> Vec<u8> {
    vec![0x50, value]
}

/// A uint, in its long form.
#[must_use]
pub fn uint(value: u32) -> Vec<u8> {
    [vec![0x70], value.to_be_bytes().to_vec()].concat()
}

/// A ulong, in its long form.
#[must_use]
pub fn ulong(value: u64) -> Vec<u8> {
    [vec![0x80], value.to_be_bytes().to_vec()].concat()
}

/// An int, in its long form.
#[must_use]
pub fn int(value: i32) -> Vec<u8> {
    [vec![0x71], value.to_be_bytes().to_vec()].concat()
}

/// A uuid.
#[must_use]
pub fn uuid(value: [u8; 16]) -> Vec<u8> {
    [vec![0x98], value.to_vec()].concat()
}

/// A string.
#[must_use]
pub fn string(text: &str) -> Vec<u8> {
    variable(0xa1, text.as_bytes())
}

/// A symbol.
#[must_use]
pub fn symbol(text: &str) -> Vec<u8> {
    variable(0xa3, text.as_bytes())
}

/// A binary.
#[must_use]
pub fn binary(bytes: &[u8]) -> Vec<u8> {
    variable(0xa0, bytes)
}

fn variable(short: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = match u8::try_from(bytes.len()) {
        Ok(length) => vec![short, length],
        Err(_) => {
            let length = u32::try_from(bytes.len()).expect("below 4 GiB");
            [vec![short + 0x10], length.to_be_bytes().to_vec()].concat()
        }
    };
    out.extend_from_slice(bytes);
    out
}

fn compound(long: u8, count: usize, content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len() + 4).expect("below 4 GiB");
    let count = u32::try_from(count).expect("few");
    let head = [size.to_be_bytes(), count.to_be_bytes()].concat();
    [vec![long], head, content.to_vec()].concat()
}

/// A list.
#[must_use]
pub fn list(items: &[Vec<u8>]) -> Vec<u8> {
    compound(0xd0, items.len(), &items.concat())
}

/// A map.
#[must_use]
pub fn map(pairs: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let content: Vec<u8> = pairs
        .iter()
        .flat_map(|(key, value)| [key.clone(), value.clone()].concat())
        .collect();
    compound(0xd1, pairs.len() * 2, &content)
}

/// A described value.
#[must_use]
pub fn described(code: u64, value: &[u8]) -> Vec<u8> {
    let code = u8::try_from(code).expect("codes of the standard");
    [&[0x00, 0x53, code], value].concat()
}

/// A frame of an AMQP connection.
#[must_use]
pub fn frame(channel: u16, body: &[u8]) -> Vec<u8> {
    typed_frame(0, channel, body)
}

/// A frame of this type.
#[must_use]
pub fn typed_frame(frame_type: u8, channel: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len() + 8).expect("below 4 GiB");
    let mut out = size.to_be_bytes().to_vec();
    out.extend_from_slice(&[2, frame_type]);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(body);
    out
}

/// open: container, host name, and an idle time-out in milliseconds.
#[must_use]
pub fn open(idle_ms: Option<u32>) -> Vec<u8> {
    let idle = idle_ms.map_or_else(null, uint);
    let fields = [string("raw"), string("gw"), uint(65_536), null(), idle];
    described(code::OPEN, &list(&fields))
}

/// begin with windows.
#[must_use]
pub fn begin() -> Vec<u8> {
    let fields = [null(), uint(0), uint(2_048), uint(2_048)];
    described(code::BEGIN, &list(&fields))
}

/// A link that is wanted.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its handle.
    pub handle: u32,
    /// Whether this client sends.
    pub sends: bool,
    /// Of the node at the hub.
    pub address: String,
    /// Link properties.
    pub properties: Vec<(&'static str, String)>,
    /// Largest message that this client takes.
    pub max_message_size: Option<u64>,
    /// Settle mode of the receiver.
    pub rcv_settle_mode: Option<u8>,
}

impl Link {
    /// A link on which this client sends.
    #[must_use]
    pub fn sender(handle: u32, address: &str) -> Self {
        Self {
            handle,
            sends: true,
            address: address.to_owned(),
            properties: Vec::new(),
            max_message_size: None,
            rcv_settle_mode: None,
        }
    }

    /// A link on which this client receives.
    #[must_use]
    pub fn receiver(handle: u32, address: &str) -> Self {
        Self {
            sends: false,
            ..Self::sender(handle, address)
        }
    }

    /// With a link property.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: &str) -> Self {
        self.properties.push((key, value.to_owned()));
        self
    }

    /// attach, without the initial delivery count, as C# sends it.
    #[must_use]
    pub fn attach(&self) -> Vec<u8> {
        let terminus = |code, address: &str| described(code, &list(&[string(address)]));
        let (source, target) = if self.sends {
            (terminus(0x28, "own"), terminus(0x29, &self.address))
        } else {
            (terminus(0x28, &self.address), terminus(0x29, "own"))
        };
        let properties: Vec<_> = self
            .properties
            .iter()
            .map(|(key, value)| (symbol(key), string(value)))
            .collect();
        let properties = if properties.is_empty() {
            null()
        } else {
            map(&properties)
        };
        described(
            code::ATTACH,
            &list(&[
                string(&format!("link-{}", self.handle)),
                uint(self.handle),
                // The role: true is a receiver.
                boolean(!self.sends),
                null(),
                self.rcv_settle_mode.map_or_else(null, ubyte),
                source,
                target,
                null(),
                null(),
                null(),
                self.max_message_size.map_or_else(null, ulong),
                null(),
                null(),
                properties,
            ]),
        )
    }
}

/// A transfer.
#[derive(Clone, Debug, Default)]
pub struct Transfer {
    /// Its link.
    pub handle: u32,
    /// Number of the delivery.
    pub id: u32,
    /// Format of the message.
    pub format: u32,
    /// Settled by this client.
    pub settled: bool,
    /// More frames follow.
    pub more: bool,
    /// The tag; else made of the id.
    pub tag: Option<Vec<u8>>,
}

impl Transfer {
    /// The frame's body with this payload.
    #[must_use]
    pub fn with(&self, payload: &[u8]) -> Vec<u8> {
        let tag = self.tag.clone();
        let tag = tag.unwrap_or_else(|| self.id.to_be_bytes().to_vec());
        let fields = [
            uint(self.handle),
            uint(self.id),
            binary(&tag),
            uint(self.format),
            boolean(self.settled),
            boolean(self.more),
        ];
        [described(code::TRANSFER, &list(&fields)), payload.to_vec()].concat()
    }
}

/// flow of a link on which this client receives.
#[must_use]
pub fn credit(handle: u32, delivery_count: u32, credit: u32, drain: bool) -> Vec<u8> {
    let fields = [
        uint(1),
        uint(2_048),
        uint(0),
        uint(2_048),
        uint(handle),
        uint(delivery_count),
        uint(credit),
        null(),
        boolean(drain),
    ];
    described(code::FLOW, &list(&fields))
}

/// disposition of this client as a receiver.
#[must_use]
pub fn disposition(first: u32, last: Option<u32>, settled: bool, outcome: u64) -> Vec<u8> {
    let fields = [
        boolean(true),
        uint(first),
        last.map_or_else(null, uint),
        boolean(settled),
        described(outcome, &[0x45]),
    ];
    described(code::DISPOSITION, &list(&fields))
}

/// Sections of a message.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// Message annotations: symbol to value.
    pub annotations: Vec<(&'static str, Vec<u8>)>,
    /// `message-id`, encoded.
    pub message_id: Option<Vec<u8>>,
    /// `reply-to`.
    pub reply_to: Option<&'static str>,
    /// `correlation-id`, encoded.
    pub correlation_id: Option<Vec<u8>>,
    /// Application properties.
    pub application: Vec<(&'static str, Vec<u8>)>,
    /// Data sections.
    pub data: Vec<Vec<u8>>,
    /// An amqp-value, encoded.
    pub value: Option<Vec<u8>>,
}

impl Message {
    /// One of a body.
    #[must_use]
    pub fn of(body: &[u8]) -> Self {
        Self {
            data: vec![body.to_vec()],
            ..Self::default()
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let pairs = |pairs: &[(&str, Vec<u8>)], key: fn(&str) -> Vec<u8>| {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| (key(k), v.clone())).collect();
            map(&pairs)
        };
        if !self.annotations.is_empty() {
            out.extend(described(0x72, &pairs(&self.annotations, symbol)));
        }
        let fields = [
            self.message_id.clone().unwrap_or_else(null),
            null(),
            null(),
            null(),
            self.reply_to.map_or_else(null, string),
            self.correlation_id.clone().unwrap_or_else(null),
        ];
        out.extend(described(0x73, &list(&fields)));
        if !self.application.is_empty() {
            out.extend(described(0x74, &pairs(&self.application, string)));
        }
        for data in &self.data {
            out.extend(described(0x75, &binary(data)));
        }
        if let Some(value) = &self.value {
            out.extend(described(0x77, value));
        }
        out
    }
}

/// put-token, as the SDKs send it.
#[must_use]
pub fn put_token(message_id: Vec<u8>, token: &str) -> Message {
    Message {
        message_id: Some(message_id),
        reply_to: Some("own"),
        application: vec![
            ("operation", string("put-token")),
            ("type", string("servicebus.windows.net:sastoken")),
            ("name", string("whatever")),
        ],
        value: Some(string(token)),
        ..Message::default()
    }
}
