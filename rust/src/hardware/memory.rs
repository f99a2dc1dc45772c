//! How much memory this process holds, and how much it can still get.
//!
//! None means that nobody could tell. A 0 that means "unknown" lets every memory check pass.

/// Memory of this process that lies in RAM, mapped model files included.
pub fn resident_bytes() -> Option<u64> {
    os::resident_bytes()
}

/// The part of it that is its own: no mapped files. This is what an unload gives back.
pub fn private_bytes() -> Option<u64> {
    os::private_bytes()
}

/// What can be allocated without swapping, in this machine and within this process's cgroup.
pub fn available_bytes() -> Option<u64> {
    os::available_bytes()
}

/// All the main memory of this machine.
pub fn total_bytes() -> Option<u64> {
    os::total_bytes()
}

/// The tightest limit that a cgroup around this process sets; None without one.
pub fn limit_bytes() -> Option<u64> {
    os::limit_bytes()
}

/// A line like `VmRSS:  1752 kB` of `/proc/self/status` or `/proc/meminfo`, in bytes.
pub fn parse_kib(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What a cgroup's limit says; None without one.
pub fn group_limit(text: &str) -> Option<u64> {
    let limit: u64 = text.trim().parse().ok()?; // `max` in version 2
    // Version 1 writes "no limit" as the largest multiple of the page size.
    (limit < 1 << 62).then_some(limit)
}

/// What one cgroup still allows; None without a limit. `inactive_file` is cache that the kernel
/// drops first: it counts as used there, but not for us.
pub fn group_allows(limit: &str, usage: &str, stat: &str, inactive_file: &str) -> Option<u64> {
    let limit = group_limit(limit)?;
    let usage: u64 = usage.trim().parse().ok()?;
    let value = |line: &str| line.strip_prefix(inactive_file)?.trim().parse().ok();
    let droppable: u64 = stat.lines().find_map(value).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(droppable)))
}

#[cfg(target_os = "linux")]
mod os {
    use std::fs::read_to_string;
    use std::path::{Path, PathBuf};

    use crate::hardware::cgroup;

    const CGROUPS: &str = "/sys/fs/cgroup";

    pub fn resident_bytes() -> Option<u64> {
        super::parse_kib(&read_to_string("/proc/self/status").ok()?, "VmRSS")
    }

    pub fn private_bytes() -> Option<u64> {
        super::parse_kib(&read_to_string("/proc/self/status").ok()?, "RssAnon")
    }

    pub fn available_bytes() -> Option<u64> {
        let group = group_available(&groups(), Path::new(CGROUPS));
        [meminfo("MemAvailable"), group].into_iter().flatten().min()
    }

    pub fn total_bytes() -> Option<u64> {
        meminfo("MemTotal")
    }

    pub fn limit_bytes() -> Option<u64> {
        group_limit(&groups(), Path::new(CGROUPS))
    }

    /// The tightest of our cgroup and those around it.
    pub fn group_available(groups: &str, mount: &Path) -> Option<u64> {
        let (folders, is_version_1) = cgroup::folders(groups, mount, "memory");
        let files = files(is_version_1);
        folders.iter().filter_map(|folder| in_group(folder, files)).min()
    }

    pub fn group_limit(groups: &str, mount: &Path) -> Option<u64> {
        let (folders, is_version_1) = cgroup::folders(groups, mount, "memory");
        let [limit, ..] = files(is_version_1);
        let read = |folder: &PathBuf| read_to_string(folder.join(limit)).ok();
        folders.iter().filter_map(|folder| super::group_limit(&read(folder)?)).min()
    }

    fn meminfo(key: &str) -> Option<u64> {
        super::parse_kib(&read_to_string("/proc/meminfo").ok()?, key)
    }

    fn groups() -> String {
        read_to_string("/proc/self/cgroup").unwrap_or_default()
    }

    fn files(is_version_1: bool) -> [&'static str; 3] {
        match is_version_1 {
            true => ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "],
            false => ["memory.max", "memory.current", "inactive_file "],
        }
    }

    fn in_group(folder: &Path, [limit, usage, inactive_file]: [&str; 3]) -> Option<u64> {
        let read = |name| read_to_string(folder.join(name));
        let stat = read("memory.stat").unwrap_or_default();
        super::group_allows(&read(limit).ok()?, &read(usage).ok()?, &stat, inactive_file)
    }
}

#[cfg(not(target_os = "linux"))]
mod os {
    pub fn resident_bytes() -> Option<u64> {
        None
    }

    pub fn private_bytes() -> Option<u64> {
        None
    }

    pub fn available_bytes() -> Option<u64> {
        None
    }

    pub fn total_bytes() -> Option<u64> {
        None
    }

    pub fn limit_bytes() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kibibytes_are_read_from_the_line_with_exactly_that_key() {
        let status = "VmRSS:\t    1752 kB\nRssAnon:\t     108 kB\nVmSwap:\t       0 kB\n";
        assert_eq!(parse_kib(status, "VmRSS"), Some(1752 * 1024));
        assert_eq!(parse_kib(status, "RssAnon"), Some(108 * 1024));
        assert_eq!(parse_kib(status, "Rss"), None);
        assert_eq!(parse_kib("VmRSS: many kB", "VmRSS"), None);
        assert_eq!(parse_kib("VmRSS: 18446744073709551615 kB", "VmRSS"), None);
        assert_eq!(parse_kib("", "VmRSS"), None);
    }

    #[test]
    fn a_group_allows_its_limit_less_what_is_used_and_cannot_be_dropped() {
        let stat = "anon 600\nfile 300\nactive_file 100\ninactive_file 200\n";
        let allows = |limit, usage, stat| group_allows(limit, usage, stat, "inactive_file ");
        assert_eq!(allows("1000\n", "900\n", stat), Some(300));
        assert_eq!(allows("1000\n", "900\n", ""), Some(100));
        assert_eq!(allows("1000\n", "1200\n", ""), Some(0));
        assert_eq!(allows("max\n", "900\n", stat), None);
        assert_eq!(allows("9223372036854771712\n", "900\n", stat), None);
        assert_eq!(allows("1000\n", "", stat), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_tightest_group_around_us_counts() {
        let mount = std::env::temp_dir().join(format!("tabagent-cgroup-{}", std::process::id()));
        let write = |file: &str, text: &str| {
            let path = mount.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("outer/memory.max", "1000\n");
        write("outer/memory.current", "400\n");
        write("outer/inner/memory.max", "max\n");
        write("outer/inner/memory.current", "100\n");
        write("memory/memory.limit_in_bytes", "500\n");
        write("memory/memory.usage_in_bytes", "400\n");
        write("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50\n");
        let available = |groups| os::group_available(groups, &mount);
        assert_eq!(available("0::/outer/inner\n"), Some(600));
        assert_eq!(available("0::/\n"), None);
        assert_eq!(available("7:memory:/the/hosts/own/path\n0::/\n"), Some(150));
        assert_eq!(os::group_limit("0::/outer/inner\n", &mount), Some(1000));
        assert_eq!(os::group_limit("0::/\n", &mount), None);
        std::fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_holds_some_memory_and_less_than_the_machine_has() {
        let resident = resident_bytes().unwrap();
        let private = private_bytes().unwrap();
        assert!(0 < private && private < resident, "{private} of {resident}");
        assert!(available_bytes().unwrap() > 0);
        assert!(available_bytes().unwrap() < total_bytes().unwrap());
    }
}
