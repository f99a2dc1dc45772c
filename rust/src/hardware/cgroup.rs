//! The cgroups this process is in: where they lie, and the limits that they and those around them set.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The path of our group of one kind (`memory`, `cpu`) in `/proc/self/cgroup`, and whether it is of
/// version 1. Version 2 has one group for all kinds.
pub fn find<'a>(groups: &'a str, kind: &str) -> Option<(&'a str, bool)> {
    let all = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let version_1 = all().find(|(kinds, _)| kinds.split(',').any(|found| found == kind));
    let version_2 = || all().find(|(kinds, _)| kinds.is_empty());
    version_1.map(|(_, path)| (path, true)).or_else(|| version_2().map(|(_, path)| (path, false)))
}

/// The folders of our group and of those around it, and whether they are of version 1: a limit
/// further up holds here as well.
pub fn folders(groups: &str, mount: &Path, kind: &str) -> (Vec<PathBuf>, bool) {
    let Some((path, is_version_1)) = find(groups, kind) else { return (Vec::new(), false) };
    let root = if is_version_1 { mount.join(kind) } else { mount.into() };
    // In a container the path may be the host's; only its root is then to be found here.
    let group = root.join(path.trim_start_matches('/'));
    let around = group.ancestors().take_while(|folder| folder.starts_with(&root));
    (around.map(Path::to_path_buf).collect(), is_version_1)
}

/// How many processors' time the group may use, 1.5 for instance; None without a quota.
pub fn cpu_quota(groups: &str, mount: &Path) -> Option<f64> {
    let (folders, is_version_1) = folders(groups, mount, "cpu");
    let quotas = folders.iter().filter_map(|folder| {
        let read = |name| read_to_string(folder.join(name)).ok();
        match is_version_1 {
            true => quota(&read("cpu.cfs_quota_us")?, &read("cpu.cfs_period_us")?),
            false => {
                let text = read("cpu.max")?;
                let (quota, period) = text.trim().split_once(' ')?;
                self::quota(quota, period)
            }
        }
    });
    quotas.min_by(f64::total_cmp)
}

/// `max`, and -1 in version 1, is no quota.
fn quota(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok().filter(|&quota| quota > 0.0)?;
    let period: f64 = period.trim().parse().ok().filter(|&period| period > 0.0)?;
    Some(quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_in_both_versions() {
        let hybrid = "4:cpu,cpuacct:/a\n3:memory:/docker/b:c\n1:name=systemd:/\n0::/d\n";
        assert_eq!(find(hybrid, "memory"), Some(("/docker/b:c", true)));
        assert_eq!(find(hybrid, "cpu"), Some(("/a", true)));
        let version_2 = "0::/user.slice/x.scope\n";
        assert_eq!(find(version_2, "memory"), Some(("/user.slice/x.scope", false)));
        assert_eq!(find("4:cpu:/\n", "memory"), None);
        assert_eq!(find("nonsense", "memory"), None);
    }

    #[test]
    fn the_tightest_quota_around_us_counts() {
        let mount = std::env::temp_dir().join(format!("tabagent-quota-{}", std::process::id()));
        let write = |file: &str, text: &str| {
            let path = mount.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("outer/cpu.max", "150000 100000\n");
        write("outer/inner/cpu.max", "max 100000\n");
        write("cpu/cpu.cfs_quota_us", "-1\n");
        write("cpu/cpu.cfs_period_us", "100000\n");
        write("cpu/box/cpu.cfs_quota_us", "50000\n");
        write("cpu/box/cpu.cfs_period_us", "100000\n");
        assert_eq!(cpu_quota("0::/outer/inner\n", &mount), Some(1.5));
        assert_eq!(cpu_quota("0::/\n", &mount), None);
        assert_eq!(cpu_quota("3:cpu,cpuacct:/box\n0::/\n", &mount), Some(0.5));
        assert_eq!(cpu_quota("3:cpu,cpuacct:/elsewhere\n", &mount), None);
        assert_eq!(cpu_quota("", &mount), None);
        std::fs::remove_dir_all(&mount).unwrap();
    }
}
