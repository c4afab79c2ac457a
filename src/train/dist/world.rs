//! Which rank of how many this process is, as its launcher says: `mpirun`, a process manager with PMI, `srun`, or the usual variables.

use crate::error::{Error, Result};

/// A process among the ranks of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    pub rank: usize,
    pub size: usize,
    /// Among the ranks of this machine.
    pub local_rank: usize,
    /// Ranks on this machine.
    pub local_size: usize,
}

/// Variables of one launcher: rank, size, rank on the machine, ranks on the machine.
const LAUNCHERS: [[&str; 4]; 4] = [
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    // Not SLURM_NTASKS: that is set in a batch script as well, where one process runs.
    ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
];

impl World {
    /// One process by itself.
    pub const ALONE: Self = Self { rank: 0, size: 1, local_rank: 0, local_size: 1 };

    /// What the environment says.
    ///
    /// # Errors
    /// Variables that are no numbers, or a rank that is not below the size.
    pub fn from_environment() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = variable(name) else { return Ok(None) };
            let parsed = text.trim().parse().map_err(|_| Error::input(name, format!("`{text}` is not a number of ranks")))?;
            Ok(Some(parsed))
        };
        for [rank_name, size_name, local_rank, local_size] in LAUNCHERS {
            let (Some(rank), Some(size)) = (number(rank_name)?, number(size_name)?) else { continue };
            if rank >= size {
                let error = Error::input(rank_name, format!("rank {rank} is not below {size_name} = {size}"));
                return Err(error.fix("let mpirun, srun or torchrun set both, or count ranks from 0"));
            }
            let local_size = number(local_size)?.unwrap_or(size).clamp(1, size);
            let local_rank = number(local_rank)?.unwrap_or(rank % local_size);
            return Ok(Self { rank, size, local_rank, local_size });
        }
        Ok(Self::ALONE)
    }

    /// Compute threads for this rank where the recipe names none: its share of the machine's cores, or the cores that the launcher bound
    /// it to. Nothing when the rank is alone on its machine.
    pub fn threads(&self) -> Option<usize> {
        if self.local_size == 1 {
            return None;
        }
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        let bound = allowed < online_cores().unwrap_or(allowed);
        Some(if bound { allowed } else { (allowed / self.local_size).max(1) })
    }
}

fn online_cores() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(text.lines().filter(|line| line.starts_with("processor")).count()).filter(|&count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<World> {
        World::read(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_understood() {
        assert_eq!(read(&[]).unwrap(), World::ALONE);
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("RANK", "7"),
            ("WORLD_SIZE", "9"),
        ];
        assert_eq!(read(&open_mpi).unwrap(), World { rank: 3, size: 4, local_rank: 1, local_size: 2 });
        // A batch script of Slurm is one process, whatever the job holds.
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap(), World::ALONE);
        let srun = [("SLURM_PROCID", "5"), ("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_LOCALID", "1"), ("SLURM_NTASKS_PER_NODE", "4")];
        assert_eq!(read(&srun).unwrap(), World { rank: 5, size: 8, local_rank: 1, local_size: 4 });
        assert_eq!(read(&[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap(), World { rank: 1, size: 2, local_rank: 1, local_size: 2 });
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(read(&[("RANK", "two"), ("WORLD_SIZE", "2")]).unwrap_err().to_string().starts_with("RANK: `two`"));
        assert!(read(&[("RANK", "2"), ("WORLD_SIZE", "2")]).unwrap_err().to_string().contains("not below"));
    }
}
