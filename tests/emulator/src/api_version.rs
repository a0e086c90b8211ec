//! The `api-version` that MQTT user names and HTTPS queries carry.

/// Whether `text` has the form of an IoT Hub API version: `20yy-mm-dd` with or without `-preview`.
pub(crate) fn is_api_version(text: &str) -> bool {
    let date = text.strip_suffix("-preview").unwrap_or(text);
    date.len() == 10
        && date.starts_with("20")
        && date.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_versions_are_dates() {
        assert!(is_api_version("2020-06-30-preview") && is_api_version("2021-04-12"));
        for bad in [
            "",
            "1",
            "1999-01-01",
            "2021-4-12",
            "2021-04-12-",
            "2021-04-12-preview2",
        ] {
            assert!(!is_api_version(bad), "{bad}");
        }
    }
}
