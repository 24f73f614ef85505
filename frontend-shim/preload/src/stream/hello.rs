//! VERSION with our capability object in it, and the answer without.
//!
//! The JSON is cut and not written anew: but for our object, both sides get the other's bytes.

use std::ops::Range;

use barkeep_protocol::wire::limits::{HEADER_SIZE, HEADER_SIZE_U32, MAX_VERSION_DATA};
use barkeep_protocol::wire::{BarkeepExtensions, Command, Header, MessageId, MessageKind, Version};
use serde_json::Value;

/// The longest message that may be a VERSION, in bytes.
pub(super) const LONGEST: usize = HEADER_SIZE + NUMBERS + MAX_VERSION_DATA;

/// The shortest, likewise.
const SHORTEST: usize = HEADER_SIZE + NUMBERS;

/// Major and minor version.
const NUMBERS: usize = 4;
const NAME: &str = "barkeep";

/// A VERSION command of the VMM's, as the server gets it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) id: MessageId,
    pub(super) bytes: Vec<u8>,
}

/// Whether a message of this length may be a VERSION, by its first bytes: id, command and size.
pub(crate) fn may_begin(start: [u8; 8], len: usize) -> bool {
    let [_, _, a, b, c, d, e, f] = start;
    u16::from_ne_bytes([a, b]) == Command::Version.code()
        && u32::from_ne_bytes([c, d, e, f]) as usize == len
}

/// Whether a message of this length may be a VERSION.
pub(crate) fn may_begin_length(len: usize) -> bool {
    (SHORTEST..=LONGEST).contains(&len)
}

impl Hello {
    /// Adds our object to a message. `None` if it is not a whole VERSION, one that speaks barkeep by
    /// itself, or not what the protocol has.
    pub(super) fn with_ours(message: &[u8]) -> Option<Self> {
        let (header, body) = whole(message)?;
        if header.kind != (MessageKind::Command { no_reply: false }) {
            return None;
        }
        let theirs = Version::parse(body).ok().filter(|version| version.major == Version::MAJOR)?;
        let (numbers, data) = body.split_at_checked(NUMBERS)?;
        let data = with_object(data)?;
        let bytes = message_of(&header, numbers, &data)?;
        // Whatever was inserted where: this is what the server makes of it.
        let ours = Version::parse(&bytes[HEADER_SIZE..]).ok()?;
        let mut expected = theirs;
        if expected.capabilities.barkeep.replace(BarkeepExtensions::all()).is_some() {
            return None;
        }
        (ours == expected).then_some(Self { id: header.id, bytes })
    }
}

/// The answer to a [`Hello`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Welcome {
    /// What the VMM gets: not longer than what came.
    pub(super) shown: Vec<u8>,
    /// What the server has of barkeep's extensions. `None`: it is another one, or refuses.
    pub(super) extensions: Option<BarkeepExtensions>,
}

impl Welcome {
    /// Takes our object out of an answer. One that is not understood stays as it is.
    pub(super) fn without_ours(message: &[u8]) -> Self {
        Self::cut(message).unwrap_or_else(|| Self { shown: message.to_vec(), extensions: None })
    }

    fn cut(message: &[u8]) -> Option<Self> {
        let (header, body) = whole(message)?;
        if header.kind != (MessageKind::Reply { error: None }) {
            return None;
        }
        let mut version = Version::parse(body).ok()?;
        let extensions = version.capabilities.barkeep.take()?;
        let (numbers, data) = body.split_at_checked(NUMBERS)?;
        let data = without_object(data)?;
        let shown = message_of(&header, numbers, &data)?;
        let left = Version::parse(&shown[HEADER_SIZE..]).ok()?;
        (left == version).then_some(Self { shown, extensions: Some(extensions) })
    }
}

/// A message that is a VERSION and nothing else.
fn whole(message: &[u8]) -> Option<(Header, &[u8])> {
    let (header, body) = message.split_first_chunk()?;
    let header = Header::parse(header).ok()?;
    let fits = header.command == Command::Version.code()
        && header.body_size as usize == body.len()
        && message.len() <= LONGEST;
    fits.then_some((header, body))
}

fn message_of(header: &Header, numbers: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    if data.len() > MAX_VERSION_DATA {
        return None;
    }
    let body_size = u32::try_from(numbers.len() + data.len()).ok()?;
    body_size.checked_add(HEADER_SIZE_U32)?;
    let header = Header { body_size, ..*header };
    Some([&header.to_bytes(), numbers, data].concat())
}

fn with_object(data: &[u8]) -> Option<Vec<u8>> {
    let ours = serde_json::to_string(&BarkeepExtensions::all()).ok()?;
    let member = format!(r#""{NAME}":{ours}"#);
    if data.is_empty() {
        return Some([br#"{"capabilities":{"#, member.as_bytes(), b"}}\0"].concat());
    }
    let top = object_at(data, 0)?;
    let capabilities = members(data, top).find(|member| &data[member.name.clone()] == CAPABILITIES);
    let (at, text) = match capabilities {
        Some(capabilities) => (object_at(data, capabilities.value.start)?, member),
        None => (top, format!(r#""capabilities":{{{member}}}"#)),
    };
    let comma: &[u8] = if members(data, at).next().is_some() { b"," } else { b"" };
    Some([&data[..at], text.as_bytes(), comma, &data[at..]].concat())
}

fn without_object(data: &[u8]) -> Option<Vec<u8>> {
    let top = object_at(data, 0)?;
    let capabilities =
        members(data, top).find(|member| &data[member.name.clone()] == CAPABILITIES)?;
    let start = object_at(data, capabilities.value.start)?;
    let all: Vec<Member> = members(data, start).collect();
    let ours = all.iter().position(|member| data[member.name.clone()] == *br#""barkeep""#)?;
    // With the comma in front of it, or the one behind the first.
    let cut = match ours.checked_sub(1) {
        Some(previous) => all[previous].value.end..all[ours].value.end,
        None => {
            let next = all.get(1).map(|next| next.name.start);
            all[0].name.start..next.unwrap_or(all[0].value.end)
        }
    };
    let left = [&data[..cut.start], &data[cut.end..]].concat();
    // The rest must be what it was, also what this crate knows nothing of.
    let json = |data: &[u8]| serde_json::from_slice::<Value>(data.strip_suffix(b"\0")?).ok();
    let mut expected = json(data)?;
    expected.get_mut("capabilities")?.as_object_mut()?.remove(NAME)?;
    (json(&left)? == expected).then_some(left)
}

const CAPABILITIES: &[u8] = br#""capabilities""#;

/// A member of an object: where its name is, with the quotes, and its value.
#[derive(Debug)]
struct Member {
    name: Range<usize>,
    value: Range<usize>,
}

/// Behind the brace of the object that begins at or behind `from`.
fn object_at(data: &[u8], from: usize) -> Option<usize> {
    let at = skip_space(data, from);
    (data.get(at) == Some(&b'{')).then_some(at + 1)
}

/// The members of an object, from behind its brace on. The data is JSON already; where it is not, this
/// ends.
fn members(data: &[u8], from: usize) -> impl Iterator<Item = Member> {
    let mut at = from;
    std::iter::from_fn(move || {
        at = skip_space(data, at);
        if data.get(at) == Some(&b',') {
            at = skip_space(data, at + 1);
        }
        let name = at..string_end(data, at)?;
        let colon = skip_space(data, name.end);
        if data.get(colon) != Some(&b':') {
            return None;
        }
        let start = skip_space(data, colon + 1);
        let value = start..value_end(data, start)?;
        at = value.end;
        Some(Member { name, value })
    })
}

fn value_end(data: &[u8], start: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = start;
    loop {
        match data.get(at)? {
            b'"' => {
                at = string_end(data, at)?;
                if depth == 0 {
                    return Some(at);
                }
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 0 => return Some(trim_end(data, start, at)),
            b'}' | b']' if depth == 1 => return Some(at + 1),
            b'}' | b']' => depth -= 1,
            b',' if depth == 0 => return Some(trim_end(data, start, at)),
            _ => {}
        }
        at += 1;
    }
}

fn trim_end(data: &[u8], start: usize, end: usize) -> usize {
    start + data[start..end].trim_ascii_end().len()
}

/// Behind the string that begins at `start`.
fn string_end(data: &[u8], start: usize) -> Option<usize> {
    if data.get(start) != Some(&b'"') {
        return None;
    }
    let mut at = start + 1;
    loop {
        match data.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

fn skip_space(data: &[u8], mut at: usize) -> usize {
    while data.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}
